//! The command line of `proxy-agent trace`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::condition::Condition;
use super::expect::{Absent, Expectation, Expectations, Outcome};
use super::inventory::Which;
use super::output::{Form, Output};
use super::recorded::Recorded;
use super::why::flow::Stage;
use super::{TraceError, boot_epoch, condition, difference, doctor, graph, inventory, live, output, picture, top, why};

/// `proxy-agent trace`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct TraceArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    live: LiveArgs,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Follow real packets (the default).
    Live(Box<LiveArgs>),
    /// Would a packet arrive, and if not, why: the first cause and what to do. Nothing is sent, but with --inject.
    #[command(after_help = WHY_EXAMPLES)]
    Why(WhyArgs),
    /// What is dropped, grouped by reason and place, with advice.
    Drops(DropsArgs),
    /// Who is registered at netfilter's hooks, by network namespace.
    Hooks(HooksArgs),
    /// The paths of a recorded trace as a graph.
    Graph(ShowArgs),
    /// A recorded trace (`-o ndjson`) in another form.
    Show(ShowArgs),
    /// What the lines of `-o ndjson` look like, as a JSON Schema: also the names for --where.
    Schema,
    /// Two recorded traces side by side: steps that only one of them has, and the times. Exit code 1 when paths differ.
    Diff {
        /// Before.
        before: PathBuf,
        /// After.
        after: PathBuf,
    },
    /// What this kernel allows, and what tracing is without.
    Doctor(PinArgs),
}

const WHY_EXAMPLES: &str = "Examples:
  trace why pod:shop/web-0 to svc:shop/api 80/tcp             would it arrive? If not, the first cause and what to do
  trace why pod:shop/web-0 to svc:shop/api 80/tcp --inject    and send one real SYN: does it agree with that?
  trace why pod:shop/web-0 to pod:shop/db:53/udp --watch 60s  and wait for the next real packet of it
  trace why pod:shop/web-0 to svc:shop/api 80/tcp --ct est    what the next packet of their connection meets
  trace why pod:shop/web-0 to svc:shop/api 80/tcp --ct reply  and what its answer meets on its way back

Exit codes: 0 it arrives, 1 it does not, or a real packet shows something else than was said, 2 the command line is wrong,
3 no real packet came or was seen, 4 it cannot be told to the end, 5 something is lacking, 130 interrupted.";

#[derive(Clone, Debug, Args)]
struct PinArgs {
    /// Where maps and links are pinned.
    #[arg(long, default_value = "/sys/fs/bpf/proxy-agent", env = "PROXY_AGENT_PIN_ROOT")]
    pin_root: PathBuf,
}

#[derive(Clone, Debug, Args)]
struct NodeArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// Folder of the CNI's results: names of pods.
    #[arg(long, default_value = "/var/lib/cni/results", env = "PROXY_AGENT_CNI_RESULTS")]
    cni_results: PathBuf,
    /// Packets of all network namespaces of this machine, not only of this one and its pods.
    #[arg(long)]
    all_namespaces: bool,
}

#[derive(Clone, Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
struct LiveArgs {
    /// What to follow: `END` or `END to END`. END is pod:NS/NAME, svc:NS/NAME[:PORT], label:KEY=VALUE[,...], node, ext,
    /// ADDRESS[/LEN], dev:NAME or any; all but svc and dev take `:PORT` or `:PORT/PROTOCOL`. Pods have labels here while
    /// there is a NetworkPolicy.
    #[arg(value_name = "SELECTION")]
    words: Vec<String>,
    /// An expression as tcpdump writes them: host, net, port, portrange, tcp, udp, icmp, tcp[syn], and, or, not.
    #[arg(short = 'f', long = "filter", value_name = "EXPRESSION")]
    expression: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
    /// Show so many packets.
    #[arg(short = 'c', long = "count", default_value_t = 20)]
    packets: usize,
    /// Stop after so long (`30s`, `5m`, `500ms`).
    #[arg(long = "for", default_value = "30s", value_parser = duration)]
    limit: Duration,
    /// Follow everything, where nothing else chooses.
    #[arg(long)]
    all: bool,
    /// Dropped packets alone.
    #[arg(long)]
    drops: bool,
    /// No replies.
    #[arg(long)]
    no_replies: bool,
    /// Of each flow the first packet of each direction alone: the default where a Service is named.
    #[arg(long, conflicts_with = "all_of_flow")]
    first_of_flow: bool,
    /// Every packet of a flow.
    #[arg(long)]
    all_of_flow: bool,
    /// Every packet in full, also when its path was shown before.
    #[arg(long)]
    each: bool,
    /// Follow one flow of so many (`1/100`).
    #[arg(long, value_name = "1/N", value_parser = sample)]
    sample: Option<u32>,
    /// Begin to follow at most so many packets a second; 0 for any number.
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// Only packets that took at least so long.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    min_latency: Option<Duration>,
    /// Only packets whose story fulfils a condition in the Common Expression Language, by the names of `trace schema`:
    /// `drop.reason == "NETFILTER_DROP" && hops.exists(hop, hop.dev == "br0")`. pkt, drop and end are objects; hops,
    /// decisions and hooks are lists.
    #[arg(long = "where", value_name = "CONDITION")]
    condition: Option<String>,
    /// Stop when the probes take more of a CPU than so many percent; measured now and then. 0: not measured.
    #[arg(long, value_name = "PERCENT", default_value_t = 0)]
    max_cpu: u64,
    /// Mebibytes of the buffer for events.
    #[arg(long = "buf", default_value_t = 8)]
    buffer: u32,
    /// Form of the output.
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Form::Tree)]
    form: Form,
    /// Write to a file.
    #[arg(short = 'w', long = "write", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Dates, in UTC.
    #[arg(long)]
    utc: bool,
    /// What every packet must come to: delivered, dropped, dropped:REASON or denied. Exit code 1 otherwise.
    #[arg(long, value_name = "ENDING")]
    expect: Option<Expectation>,
    /// What no packet may meet.
    #[arg(long, value_enum, value_name = "WHAT", value_delimiter = ',')]
    expect_no: Vec<Absent>,
    /// What no step may take longer than.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    max_hop_latency: Option<Duration>,
}

#[derive(Debug, Args)]
struct WhyArgs {
    /// `END to END [PORT/PROTOCOL]`. END is pod:NS/NAME, node or an address, as receiver also svc:NS/NAME[:PORT]; without a
    /// port an echo request is meant.
    #[arg(value_name = "SELECTION", required = true)]
    words: Vec<String>,
    /// The source address that the sender's packets carry, where it is not its own.
    #[arg(long, value_name = "ADDRESS")]
    source: Option<std::net::IpAddr>,
    /// Bytes of the packet, from its IP header on. Without it the headers alone.
    #[arg(long, value_name = "BYTES", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=9_000))]
    size: u16,
    /// In which state of its flow the packet is: it opens one, or belongs to one of the flow tables.
    #[arg(long = "ct", value_name = "STATE", value_enum, default_value_t = Stage::New)]
    stage: Stage,
    /// Send one real packet as the sender would (a SYN, a datagram without content, an echo request), follow it and say
    /// whether it agrees. A connection that it begins is reset at once. It is the pod's at the node's end of its veth:
    /// what is inside of the pod is not tried.
    #[arg(long, conflicts_with_all = ["watch", "stage", "source"])]
    inject: bool,
    /// Wait so long (`60s`, `5m`) for the next real packet from the sender to the receiver, and say whether it agrees.
    #[arg(long, value_name = "DURATION", value_parser = some_time)]
    watch: Option<Duration>,
    #[command(flatten)]
    pins: PinArgs,
    /// Folder of the CNI's results: names of pods.
    #[arg(long, default_value = "/var/lib/cni/results", env = "PROXY_AGENT_CNI_RESULTS")]
    cni_results: PathBuf,
    /// Form of the output: tree or ndjson.
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Form::Tree)]
    form: Form,
}

#[derive(Debug, Args)]
struct DropsArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Groups to show.
    #[arg(long, default_value_t = 10)]
    top: usize,
    /// How often to show them.
    #[arg(long, default_value = "1s", value_parser = duration)]
    every: Duration,
    /// Stop after so long.
    #[arg(long = "for", default_value = "30s", value_parser = duration)]
    limit: Duration,
    /// One table, at the end.
    #[arg(long)]
    once: bool,
    /// Routine as well.
    #[arg(long)]
    all: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct HooksArgs {
    /// own, all, or the inode number of a network namespace.
    #[arg(long, default_value = "own")]
    netns: Which,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// What `-o ndjson` wrote.
    file: PathBuf,
    /// Only packets whose story fulfils a condition in the Common Expression Language, by the names of `trace schema`:
    /// `drop.reason == "NETFILTER_DROP" && hops.exists(hop, hop.dev == "br0")`. pkt, drop and end are objects; hops,
    /// decisions and hooks are lists.
    #[arg(long = "where", value_name = "CONDITION")]
    condition: Option<String>,
    /// Form of the output.
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Form::Mermaid)]
    form: Form,
    /// Write to a file.
    #[arg(short = 'w', long = "write", value_name = "FILE")]
    to: Option<PathBuf>,
}

/// `500ms`, `30s`, `5m`.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| format!("`{text}`: a time is 500ms, 30s or 5m"))?;
    match unit {
        "us" | "µs" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" | "" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number * 60)),
        _ => Err(format!("`{text}`: a time is 500ms, 30s or 5m")),
    }
}

/// The same, but not 0.
fn some_time(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|time| {
        if time.is_zero() { Err(format!("`{text}`: nothing comes within no time; give 60s or 5m")) } else { Ok(time) }
    })
}

fn sample(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("1/").unwrap_or(text).parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| format!("`{text}`: one of so many is `1/100`"))
}

impl TraceArgs {
    /// Does what was asked for, tells on standard error why it could not, and ends with the code that says so.
    pub fn run(self) -> ExitCode {
        let done = match self.verb {
            None => follow(&self.live),
            Some(Verb::Live(live)) => follow(&live),
            Some(Verb::Why(args)) => explain(args),
            Some(Verb::Drops(args)) => count(args),
            Some(Verb::Hooks(args)) => list(&args),
            Some(Verb::Graph(args) | Verb::Show(args)) => show(&args),
            Some(Verb::Diff { before, after }) => compare(&before, &after),
            Some(Verb::Schema) => {
                crate::view::lines(&[condition::SCHEMA.trim_end().to_owned()], "");
                Ok(Outcome::Good)
            }
            Some(Verb::Doctor(pins)) => {
                let report = doctor::report(&pins.pin_root);
                crate::view::check(&report);
                Ok(if crate::check::is_fit(&report) { Outcome::Good } else { Outcome::Unavailable })
            }
        };
        let outcome = done.unwrap_or_else(|error| {
            let outcome = error.outcome();
            let error = anyhow::Error::from(error);
            #[expect(clippy::print_stderr, reason = "the last word of a failed command")]
            {
                eprintln!("proxy-agent trace: {error:#}");
            }
            outcome
        });
        ExitCode::from(outcome as u8)
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, TraceError> {
    let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
    built.map_err(|source| TraceError::File { path: "runtime".to_owned(), source })
}

fn target(file: Option<&Path>) -> Result<Box<dyn Write>, TraceError> {
    match file {
        None => Ok(Box::new(std::io::stdout())),
        Some(path) => {
            let made =
                File::create(path).map_err(|source| TraceError::File { path: path.display().to_string(), source })?;
            Ok(Box::new(std::io::BufWriter::new(made)))
        }
    }
}

fn parsed(condition: Option<&str>) -> Result<Option<Condition>, TraceError> {
    Ok(condition.map(str::parse).transpose()?)
}

fn follow(args: &LiveArgs) -> Result<Outcome, TraceError> {
    if args.form == Form::Pcapng && args.file.is_none() && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return Err(TraceError::Usage("a capture is no text: give -w FILE, or a pipe".to_owned()));
    }
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let options = live::Options {
        pin_root: args.node.pins.pin_root.clone(),
        cni: args.node.cni_results.clone(),
        words: args.words.clone(),
        expression: args.expression.clone(),
        packets: args.packets,
        limit: args.limit,
        no_replies: args.no_replies,
        first_of_flow: match (args.first_of_flow, args.all_of_flow) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        },
        drops: args.drops,
        sample: args.sample.unwrap_or(0),
        rate: args.rate,
        least: args.min_latency.map_or(0, nanoseconds),
        condition: parsed(args.condition.as_deref())?,
        most_cpu: args.max_cpu,
        buffer: args.buffer,
        all_namespaces: args.node.all_namespaces,
        all: args.all,
        expectations: Expectations {
            ending: args.expect.clone(),
            absent: args.expect_no.clone(),
            hop_latency: args.max_hop_latency.map(nanoseconds),
        },
    };
    let node = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let output = Output::new(args.form, target(args.file.as_deref())?, args.each, args.utc, boot_epoch());
    runtime()?.block_on(live::run(options, output, &node))
}

fn explain(args: WhyArgs) -> Result<Outcome, TraceError> {
    let is_json = match args.form {
        Form::Tree => false,
        Form::Ndjson => true,
        _ => return Err(TraceError::Usage("the answer is a tree or ndjson".to_owned())),
    };
    let options = why::Options {
        pin_root: args.pins.pin_root,
        cni: args.cni_results,
        words: args.words,
        source: args.source,
        size: args.size,
        is_json,
        stage: args.stage,
        inject: args.inject,
        watch: args.watch,
    };
    let (text, outcome) = runtime()?.block_on(why::run(&options))?;
    crate::view::lines(&[text], "");
    Ok(outcome)
}

fn count(args: DropsArgs) -> Result<Outcome, TraceError> {
    let options = top::Options {
        pin_root: args.node.pins.pin_root,
        cni: args.node.cni_results,
        top: args.top,
        every: args.every.max(Duration::from_millis(50)),
        limit: args.limit,
        once: args.once,
        all: args.all,
        is_json: args.json,
        all_namespaces: args.node.all_namespaces,
    };
    let write = |text: &str| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    };
    runtime()?.block_on(top::run(options, write))
}

fn list(args: &HooksArgs) -> Result<Outcome, TraceError> {
    let found = inventory::choose(&inventory::read()?, &args.netns);
    if found.is_empty() {
        return Err(TraceError::Usage("no task lives in that network namespace, or there is none".to_owned()));
    }
    let text = if args.json { inventory::json(&found).to_string() } else { inventory::text(&found) };
    crate::view::lines(&[text], "");
    Ok(Outcome::Good)
}

fn show(args: &ShowArgs) -> Result<Outcome, TraceError> {
    let recorded = Recorded::read(&args.file, parsed(args.condition.as_deref())?.as_ref())?;
    let bytes = match args.form {
        Form::Pcapng | Form::Mermaid => output::whole(args.form, &recorded),
        Form::Svg => picture::svg(&graph::Graph::new(&recorded)).into_bytes(),
        Form::Tree | Form::Line | Form::Ndjson | Form::Summary => steps(&recorded).into_bytes(),
    };
    let path = || args.to.as_ref().map_or_else(|| "output".to_owned(), |path| path.display().to_string());
    let written = target(args.to.as_deref())?.write_all(&bytes);
    written.map_err(|source| TraceError::File { path: path(), source })?;
    Ok(Outcome::Good)
}

/// Packets with their steps, as far as a record tells.
fn steps(recorded: &Recorded) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for packet in &recorded.packets {
        let _ = writeln!(text, "#{}  {}", packet.flow, packet.who);
        let begin = packet.steps.first().map_or(0, |step| step.ns);
        for step in &packet.steps {
            let offset = super::tree::duration(step.ns.saturating_sub(begin));
            let _ = writeln!(text, "│  +{offset:<9} {}", step.comment);
        }
        let drop = packet.drop.as_ref().map(|drop| format!(": {drop}")).unwrap_or_default();
        let _ = writeln!(text, "└─ {}{drop}  total {}", packet.result, super::tree::duration(packet.total));
    }
    text
}

fn compare(before: &Path, after: &Path) -> Result<Outcome, TraceError> {
    let (text, differs) = difference::compare(&Recorded::read(before, None)?, &Recorded::read(after, None)?);
    crate::view::lines(&[text.trim_end().to_owned()], "");
    Ok(if differs { Outcome::Failed } else { Outcome::Good })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: TraceArgs,
    }

    #[test]
    fn the_first_word_may_be_a_verb_or_a_selection() {
        let parse = |line: &str| Line::try_parse_from(line.split(' ')).map(|line| line.args);
        let live = parse("trace pod:a/b to svc:c/d:80 -c 3 --for 5s --expect delivered --expect-no nf,conntrack")
            .expect("live");
        assert!(live.verb.is_none());
        assert_eq!(live.live.words, ["pod:a/b", "to", "svc:c/d:80"]);
        assert_eq!((live.live.packets, live.live.limit), (3, Duration::from_secs(5)));
        assert_eq!(live.live.expect_no, [Absent::Nf, Absent::Conntrack]);
        assert!(matches!(parse("trace live any").expect("live").verb, Some(Verb::Live(live)) if live.words == ["any"]));
        assert!(matches!(parse("trace drops --once").expect("drops").verb, Some(Verb::Drops(args)) if args.once));
        assert!(matches!(parse("trace diff a b").expect("diff").verb, Some(Verb::Diff { .. })));
        let why = parse("trace why pod:a/b to node --ct reply --watch 5m").expect("why");
        assert!(
            matches!(why.verb, Some(Verb::Why(args)) if args.stage == Stage::Reply && args.watch == Some(Duration::from_mins(5)))
        );
        assert!(matches!(parse("trace why a to b --inject").expect("why").verb, Some(Verb::Why(args)) if args.inject));
        for more in ["--inject --watch 5s", "--inject --ct est", "--inject --source 10.0.0.1", "--watch 0s", "--ct old"]
        {
            assert!(parse(&format!("trace why a to b {more}")).is_err(), "{more}");
        }
        for line in ["trace any --for soon", "trace any --sample 0", "trace any --expect well", "trace hooks --netns x"]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn times_are_read() {
        let found = ["500ms", "30s", "5m", "7", "9us"].map(duration);
        let expected = [
            Duration::from_millis(500),
            Duration::from_secs(30),
            Duration::from_mins(5),
            Duration::from_secs(7),
            Duration::from_micros(9),
        ];
        assert_eq!(found, expected.map(Ok));
        assert!(["", "s", "1h"].map(duration).iter().all(Result::is_err));
    }
}
