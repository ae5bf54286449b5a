//! Running a program to its end, with errors that say what was run and what it said.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;

use crate::error::{Error, Result};

/// Program and arguments as one line.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs `command` and returns its stdout; an exit status other than 0 is an error.
pub fn output(command: &mut Command) -> Result<String> {
    feed(command, "")
}

/// Runs `command` with `input` on its stdin and returns its stdout; an exit status other than 0 is an error.
pub fn feed(command: &mut Command, input: &str) -> Result<String> {
    let spawn = |command: &Command, source| Error::Spawn { command: shown(command), source };
    let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| spawn(command, source))?;
    let pipe = child.stdin.take();
    let done = thread::scope(|scope| {
        // A program that ends before it has read everything breaks the pipe; its exit status tells more than that.
        scope.spawn(move || pipe.map(|mut pipe| pipe.write_all(input.as_bytes())));
        child.wait_with_output()
    })
    .map_err(|source| spawn(command, source))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    Err(Error::Command {
        command: shown(command),
        status: done.status.to_string(),
        stderr: String::from_utf8_lossy(&done.stderr).trim().to_owned(),
        input: if input.is_empty() { String::new() } else { format!("\n{input}") },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_stdin_and_reports_stderr() {
        assert_eq!(feed(&mut Command::new("cat"), "a\nb\n").expect("cat"), "a\nb\n");
        let failed = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).expect_err("exit 3");
        assert_eq!(failed.to_string(), "`sh -c echo why >&2; exit 3` failed (exit status: 3): why");
    }
}
