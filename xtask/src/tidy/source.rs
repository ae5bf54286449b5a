//! The repository's text files, and Rust without what is not code.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Directories that hold what is made or what belongs to a tool.
const SKIPPED: [&str; 3] = ["target", ".git", "node_modules"];

/// One text file.
#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    /// Relative to the root, with `/`.
    pub(super) path: String,
    /// As it is.
    pub(super) text: String,
    /// Rust only: comments and literals blanked, lines kept.
    pub(super) code: String,
}

/// All text files.
#[derive(Clone, Debug, Default)]
pub(super) struct Repository {
    files: Vec<SourceFile>,
}

impl SourceFile {
    pub(super) fn new(path: &str, text: &str) -> Self {
        let code = if has_extension(path, "rs") { blank_non_code(text) } else { String::new() };
        Self { path: path.to_owned(), text: text.to_owned(), code }
    }

    pub(super) fn is_rust(&self) -> bool {
        has_extension(&self.path, "rs")
    }

    /// Whether nothing but tests is in it.
    pub(super) fn is_test(&self) -> bool {
        let stem = Path::new(&self.path).file_stem().unwrap_or_default().to_string_lossy();
        stem == "tests" || stem.ends_with("_tests") || self.path.contains("/tests/")
    }

    /// Lines that are not part of a `#[cfg(test)]` item.
    pub(super) fn lines_without_tests(&self) -> usize {
        let mut rest = self.code.as_str();
        let mut tests = 0;
        while let Some(start) = rest.find("#[cfg(test)]") {
            let item = &rest[start..];
            let length = item_length(item);
            tests += item[..length].matches('\n').count() + 1;
            rest = &item[length..];
        }
        self.code.lines().count().saturating_sub(tests)
    }

    /// Lines (from 1) on which `word` stands in the code as a word of its own.
    pub(super) fn lines_with_word<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        self.code
            .lines()
            .enumerate()
            .filter(move |(_, line)| word_starts(line, word).next().is_some())
            .map(|(n, _)| n + 1)
    }
}

impl Repository {
    /// Reads every text file below `root`.
    pub(super) fn read(root: &Path) -> Result<Self> {
        let mut repository = Self::default();
        repository.add_directory(root, "")?;
        repository.files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(repository)
    }

    #[cfg(test)]
    pub(super) fn of(files: &[(&str, &str)]) -> Self {
        Self { files: files.iter().map(|(path, text)| SourceFile::new(path, text)).collect() }
    }

    fn add_directory(&mut self, directory: &Path, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = format!("{prefix}{name}");
            let kind = entry.file_type()?;
            if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
                self.add_directory(&entry.path(), &format!("{path}/"))?;
            } else if kind.is_file()
                && let Ok(text) = String::from_utf8(fs::read(entry.path())?)
            {
                // What is not UTF-8 (a captured packet, an image) has no rules.
                self.files.push(SourceFile::new(&path, &text));
            }
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &SourceFile> {
        self.files.iter()
    }

    pub(super) fn rust(&self) -> impl Iterator<Item = &SourceFile> {
        self.files().filter(|file| file.is_rust())
    }

    /// The file at exactly this path.
    pub(super) fn file(&self, path: &str) -> Option<&SourceFile> {
        self.files().find(|file| file.path == path)
    }
}

pub(super) fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

/// Where `word` begins in `line`, not as a part of a longer word.
pub(super) fn word_starts<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| !line[..at].ends_with(in_word) && !line[at + word.len()..].starts_with(in_word))
}

/// Length of the item that `code` starts with: up to its `;`, or to the end of its first braces.
fn item_length(code: &str) -> usize {
    let mut depth = 0_usize;
    for (at, c) in code.char_indices() {
        match c {
            ';' if depth == 0 => return at + 1,
            '{' => depth += 1,
            '}' if depth <= 1 => return at + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

/// `text` with every character of comments, strings and character literals replaced by a space; line ends stay.
pub(super) fn blank_non_code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    let mut after_word = false;
    while let Some(first) = rest.chars().next() {
        // `r"` and `b'` begin a literal only where no longer name ends: `for"` is no raw string.
        let length = if after_word { 0 } else { literal_length(rest) };
        let length = if length > 0 { length } else { non_code_length(rest) };
        if length == 0 {
            code.push(first);
            after_word = first.is_alphanumeric() || first == '_';
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            after_word = false;
            rest = &rest[length..];
        }
    }
    code
}

/// Length of the comment, string or character literal that `rest` begins with; 0 if it begins with code.
fn non_code_length(rest: &str) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment_length(rest);
    }
    if rest.starts_with('"') {
        return quoted_length(rest, '"');
    }
    let mut characters = rest.strip_prefix('\'').unwrap_or_default().chars();
    match (characters.next(), characters.next()) {
        (Some('\\'), _) => quoted_length(rest, '\''),
        // Anything else between two quotes is a character; a quote without its partner begins a lifetime.
        (Some(c), Some('\'')) => c.len_utf8() + 2,
        _ => 0,
    }
}

/// Length of a literal with a prefix (`r"…"`, `br#"…"#`, `b'…'`, `c"…"`); 0 if there is none.
fn literal_length(rest: &str) -> usize {
    let prefix = rest.find(|c: char| !"bcr".contains(c)).unwrap_or(rest.len());
    if prefix == 0 || prefix > 2 {
        return 0;
    }
    let (letters, tail) = rest.split_at(prefix);
    let hashes = tail.len() - tail.trim_start_matches('#').len();
    if letters.ends_with('r') && tail[hashes..].starts_with('"') {
        let closing = format!("\"{}", "#".repeat(hashes));
        let start = prefix + hashes + 1;
        return rest[start..].find(&closing).map_or(rest.len(), |at| start + at + closing.len());
    }
    if !letters.ends_with('r') && tail.starts_with(['"', '\'']) {
        return match non_code_length(tail) {
            0 => 0,
            length => prefix + length,
        };
    }
    0
}

fn block_comment_length(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn quoted_length(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        if !escaped && c == quote {
            return at + 1;
        }
        escaped = !escaped && c == '\\';
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        let cases = [
            ("a // unsafe\nb", "a          \nb"),
            ("a/*x/*y*/z*/b", "a           b"),
            (r#"f("un\"safe") + 1"#, "f(          ) + 1"),
            ("r#\"a\"b\"# x", "         x"),
            ("br\"a\" b'\\'' c\"z\" for", "                 for"),
            ("'a' 'x: &'a T '\\n'", "    'x: &'a T     "),
            ("'ü' \"ü\n\"", "      \n "),
        ];
        assert_eq!(cases.map(|(text, _)| blank_non_code(text)), cases.map(|(_, code)| code));
    }

    #[test]
    fn test_items_do_not_count_as_lines() {
        let text =
            "fn a() {}\n#[cfg(test)]\nmod x_tests;\nfn b() {}\n#[cfg(test)]\nmod tests {\n  fn c() { '{'; }\n}\n";
        assert_eq!(SourceFile::new("a.rs", text).lines_without_tests(), 2);
    }

    #[test]
    fn words_are_whole() {
        assert_eq!(word_starts("unsafe_code unsafe my_unsafe unsafe{", "unsafe").collect::<Vec<_>>(), [12, 29]);
    }
}
