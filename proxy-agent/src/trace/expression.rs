//! Filters as tcpdump writes them, a documented part of that language:
//!
//! ```text
//!   or      ::= and { ("or" | "||") and }
//!   and     ::= not { ["and" | "&&"] not }
//!   not     ::= ("not" | "!") not | "(" or ")" | term
//!   term    ::= [proto] [dir] ("host" ADDRESS | "net" ADDRESS/LEN | "port" N | "portrange" N-N) | [dir] ADDRESS | proto
//!   proto   ::= "ip" | "ip6" | "tcp" | "udp" | "sctp" | "icmp" | "icmp6" | "proto" N
//!   dir     ::= "src" | "dst"
//!   flags   ::= "tcp" "[" NAME { "," NAME } "]"      all of these set: syn ack fin rst psh urg
//! ```
//!
//! An expression is judged twice: in the kernel as rows of which one must hold, so that little is told; and by the
//! reader.

use proxy_abi::trace::{ROWS, TraceRow};
use proxy_abi::{FAMILY_IPV4, FAMILY_IPV6, IpBytes, Proto};

use super::packet::{Net, Packet, flag};

/// A parsed expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// Both.
    And(Box<Self>, Box<Self>),
    /// One of both.
    Or(Box<Self>, Box<Self>),
    /// The contrary.
    Not(Box<Self>),
    /// A term.
    Is(Term),
}

/// What is asked of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// The source.
    Source(Net),
    /// The destination.
    Destination(Net),
    /// The source port, from and to.
    SourcePort(u16, u16),
    /// The destination port, from and to.
    DestinationPort(u16, u16),
    /// The protocol.
    Proto(u8),
    /// 4 or 6.
    Family(u8),
    /// TCP flags that are all set.
    Flags(u8),
}

/// What is wrong with an expression, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}\n  {text}\n  {:>width$}", "^", width = .at + 1)]
pub struct ExpressionError {
    /// The expression.
    pub text: String,
    /// Characters before the place.
    pub at: usize,
    /// What is wrong and what could stand there.
    pub message: String,
}

struct Parser<'a> {
    text: &'a str,
    words: Vec<(usize, &'a str)>,
    next: usize,
}

/// Words with their places; brackets and signs are words of their own.
fn words(text: &str) -> Vec<(usize, &str)> {
    let mut words = Vec::new();
    let mut start = None;
    for (at, c) in text.char_indices() {
        let sign = "()![],".contains(c);
        if (sign || c.is_whitespace())
            && let Some(from) = start.take()
        {
            words.push((from, text.get(from..at).unwrap_or_default()));
        }
        if sign {
            words.push((at, text.get(at..at + 1).unwrap_or_default()));
        } else if !c.is_whitespace() {
            start.get_or_insert(at);
        }
    }
    if let Some(from) = start {
        words.push((from, text.get(from..).unwrap_or_default()));
    }
    words
}

impl std::str::FromStr for Expression {
    type Err = ExpressionError;

    fn from_str(text: &str) -> Result<Self, ExpressionError> {
        let mut parser = Parser { text, words: words(text), next: 0 };
        if parser.words.is_empty() {
            return Err(parser.wrong("the expression is empty; for example `host 10.0.0.1 and tcp port 80`"));
        }
        let expression = parser.or()?;
        match parser.peek() {
            None => Ok(expression),
            Some(")") => Err(parser.wrong("no bracket is open here")),
            Some(word) => {
                let message = format!("`{word}` is not understood here; join terms with `and` or `or`");
                Err(parser.wrong(&message))
            }
        }
    }
}

fn both(a: Expression, b: Expression) -> Expression {
    Expression::And(Box::new(a), Box::new(b))
}

fn either(a: Expression, b: Expression) -> Expression {
    Expression::Or(Box::new(a), Box::new(b))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Source,
    Destination,
    Any,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.next).map(|(_, word)| *word)
    }

    fn take(&mut self) -> Option<&'a str> {
        let word = self.peek();
        self.next += 1;
        word
    }

    /// About the word that is next.
    fn wrong(&self, message: &str) -> ExpressionError {
        let at = self.words.get(self.next).map_or(self.text.len(), |(at, _)| *at);
        let at = self.text.get(..at).map_or(at, |before| before.chars().count());
        ExpressionError { text: self.text.to_owned(), at, message: message.to_owned() }
    }

    fn or(&mut self) -> Result<Expression, ExpressionError> {
        let mut all = self.and()?;
        while matches!(self.peek(), Some("or" | "||")) {
            self.next += 1;
            all = either(all, self.and()?);
        }
        Ok(all)
    }

    fn and(&mut self) -> Result<Expression, ExpressionError> {
        let mut all = self.not()?;
        loop {
            match self.peek() {
                None | Some("or" | "||" | ")") => return Ok(all),
                Some("and" | "&&") => self.next += 1,
                Some(word) if is_term(word) => {}
                Some(_) => return Ok(all),
            }
            all = both(all, self.not()?);
        }
    }

    fn not(&mut self) -> Result<Expression, ExpressionError> {
        match self.peek() {
            Some("not" | "!") => {
                self.next += 1;
                Ok(Expression::Not(Box::new(self.not()?)))
            }
            Some("(") => {
                let open = self.next;
                self.next += 1;
                let inner = self.or()?;
                if self.take() != Some(")") {
                    self.next = open;
                    return Err(self.wrong("this bracket is not closed"));
                }
                Ok(inner)
            }
            _ => self.term(),
        }
    }

    fn term(&mut self) -> Result<Expression, ExpressionError> {
        let begin = self.next;
        let mut proto = None;
        if let Some(found) = self.peek().and_then(protocol) {
            self.next += 1;
            proto = Some(Expression::Is(found));
            if self.peek() == Some("[") {
                return self.flags();
            }
        } else if self.peek() == Some("proto") {
            self.next += 1;
            let number = self.peek().and_then(|word| word.parse().ok());
            let number = number.ok_or_else(|| self.wrong("after `proto` comes its number, 0 to 255"))?;
            self.next += 1;
            return Ok(Expression::Is(Term::Proto(number)));
        }
        let direction = match self.peek() {
            Some("src") => Direction::Source,
            Some("dst") => Direction::Destination,
            _ => Direction::Any,
        };
        if direction != Direction::Any {
            self.next += 1;
        }
        let term = match self.peek() {
            Some("host" | "net") => {
                let what = self.take().unwrap_or_default();
                Some(self.address(direction, what)?)
            }
            Some("port" | "portrange") => {
                self.next += 1;
                Some(self.ports(direction)?)
            }
            Some(word) if word.parse::<Net>().is_ok() => Some(self.address(direction, "host")?),
            _ => None,
        };
        match (proto, term) {
            (Some(proto), Some(term)) => Ok(both(proto, term)),
            (Some(proto), None) if direction == Direction::Any => Ok(proto),
            (None, Some(term)) => Ok(term),
            _ => {
                if direction == Direction::Any {
                    self.next = begin;
                }
                let word = self.peek().unwrap_or("the end");
                let message = format!(
                    "`{word}` is not understood; expected host, net, port, portrange, src, dst, ip, ip6, tcp, udp, sctp, \
                     icmp, icmp6, proto, an address, not or ("
                );
                Err(self.wrong(&message))
            }
        }
    }

    fn address(&mut self, direction: Direction, what: &str) -> Result<Expression, ExpressionError> {
        let word = self.peek().unwrap_or_default();
        let net: Net =
            word.parse().map_err(|_| self.wrong(&format!("after `{what}` comes an address, `{word}` is none")))?;
        self.next += 1;
        let (source, destination) = (Expression::Is(Term::Source(net)), Expression::Is(Term::Destination(net)));
        Ok(match direction {
            Direction::Source => source,
            Direction::Destination => destination,
            Direction::Any => either(source, destination),
        })
    }

    fn ports(&mut self, direction: Direction) -> Result<Expression, ExpressionError> {
        let word = self.peek().unwrap_or_default();
        let (low, high) = word.split_once('-').unwrap_or((word, word));
        let range = low.parse().ok().zip(high.parse().ok()).filter(|(low, high): &(u16, u16)| low <= high);
        let (low, high) =
            range.ok_or_else(|| self.wrong("a port is a number from 0 to 65535, a range two of them: 80-90"))?;
        self.next += 1;
        let source = Expression::Is(Term::SourcePort(low, high));
        let destination = Expression::Is(Term::DestinationPort(low, high));
        Ok(match direction {
            Direction::Source => source,
            Direction::Destination => destination,
            Direction::Any => either(source, destination),
        })
    }

    fn flags(&mut self) -> Result<Expression, ExpressionError> {
        self.next += 1;
        let mut flags = 0;
        loop {
            flags |= match self.peek() {
                Some("syn") => flag::SYN,
                Some("ack") => flag::ACK,
                Some("fin") => flag::FIN,
                Some("rst") => flag::RST,
                Some("psh") => flag::PSH,
                Some("urg") => flag::URG,
                _ => return Err(self.wrong("flags of TCP are syn, ack, fin, rst, psh and urg, with commas")),
            };
            self.next += 1;
            match self.take() {
                Some(",") => {}
                Some("]") => {
                    return Ok(both(Expression::Is(Term::Proto(Proto::TCP.0)), Expression::Is(Term::Flags(flags))));
                }
                _ => {
                    self.next -= 1;
                    return Err(self.wrong("expected `,` or `]`"));
                }
            }
        }
    }
}

fn protocol(word: &str) -> Option<Term> {
    Some(match word {
        "ip" => Term::Family(4),
        "ip6" => Term::Family(6),
        "tcp" => Term::Proto(Proto::TCP.0),
        "udp" => Term::Proto(Proto::UDP.0),
        "sctp" => Term::Proto(Proto::SCTP.0),
        "icmp" => Term::Proto(Proto::ICMP.0),
        "icmp6" => Term::Proto(Proto::ICMPV6.0),
        _ => return None,
    })
}

fn is_term(word: &str) -> bool {
    protocol(word).is_some()
        || ["host", "net", "port", "portrange", "src", "dst", "proto", "not", "!", "("].contains(&word)
        || word.parse::<Net>().is_ok()
}

impl Expression {
    /// Does it hold for a packet?
    pub fn holds(&self, packet: &Packet) -> bool {
        match self {
            Self::And(a, b) => a.holds(packet) && b.holds(packet),
            Self::Or(a, b) => a.holds(packet) || b.holds(packet),
            Self::Not(inner) => !inner.holds(packet),
            Self::Is(term) => term.holds(packet),
        }
    }

    /// Rows for the kernel, of which one must hold; empty = there would be too many, and any packet must be told.
    pub fn rows(&self) -> Vec<TraceRow> {
        self.alternatives(true).unwrap_or_default()
    }

    /// All ways in which it can be `wanted`, as a list of conjunctions.
    fn alternatives(&self, wanted: bool) -> Option<Vec<TraceRow>> {
        match (self, wanted) {
            (Self::Not(inner), _) => inner.alternatives(!wanted),
            (Self::Is(term), _) => Some(vec![term.row(wanted)]),
            (Self::Or(a, b), true) | (Self::And(a, b), false) => {
                let all = [a.alternatives(wanted)?, b.alternatives(wanted)?].concat();
                (all.len() <= ROWS as usize).then_some(all)
            }
            (Self::And(a, b), true) | (Self::Or(a, b), false) => {
                let (a, b) = (a.alternatives(wanted)?, b.alternatives(wanted)?);
                let mut all = Vec::new();
                for x in &a {
                    for y in &b {
                        all.extend(join(x, y));
                    }
                }
                (all.len() <= ROWS as usize).then_some(all)
            }
        }
    }
}

/// Both rows as one, at most as strict: what does not fit into one row is left to the reader.
fn join(a: &TraceRow, b: &TraceRow) -> Option<TraceRow> {
    let mut row = *a;
    let asks = |row: &TraceRow, part: u32| match part {
        TraceRow::NOT_SRC => row.src_mask != IpBytes::UNSPECIFIED,
        TraceRow::NOT_DST => row.dst_mask != IpBytes::UNSPECIFIED,
        TraceRow::NOT_SRC_PORT => (row.src_low, row.src_high) != (0, u16::MAX),
        TraceRow::NOT_DST_PORT => (row.dst_low, row.dst_high) != (0, u16::MAX),
        TraceRow::NOT_PROTO => row.proto != 0,
        TraceRow::NOT_FLAGS => row.flags_mask != 0,
        _ => row.family != 0,
    };
    let parts = [
        TraceRow::NOT_SRC,
        TraceRow::NOT_DST,
        TraceRow::NOT_SRC_PORT,
        TraceRow::NOT_DST_PORT,
        TraceRow::NOT_PROTO,
        TraceRow::NOT_FLAGS,
        TraceRow::NOT_FAMILY,
    ];
    for part in parts {
        if !asks(b, part) {
            continue;
        }
        if asks(a, part) {
            // Two different protocols or families at once: never.
            let (same, positive) =
                (part == TraceRow::NOT_PROTO && a.proto == b.proto, (a.negated | b.negated) & part == 0);
            if positive
                && (part == TraceRow::NOT_PROTO && !same || part == TraceRow::NOT_FAMILY && a.family != b.family)
            {
                return None;
            }
            continue;
        }
        row.negated |= b.negated & part;
        match part {
            TraceRow::NOT_SRC => (row.src, row.src_mask) = (b.src, b.src_mask),
            TraceRow::NOT_DST => (row.dst, row.dst_mask) = (b.dst, b.dst_mask),
            TraceRow::NOT_SRC_PORT => (row.src_low, row.src_high) = (b.src_low, b.src_high),
            TraceRow::NOT_DST_PORT => (row.dst_low, row.dst_high) = (b.dst_low, b.dst_high),
            TraceRow::NOT_PROTO => row.proto = b.proto,
            TraceRow::NOT_FLAGS => (row.flags_mask, row.flags) = (b.flags_mask, b.flags),
            _ => row.family = b.family,
        }
    }
    Some(row)
}

impl Term {
    fn holds(self, packet: &Packet) -> bool {
        match self {
            Self::Source(net) => net.contains(packet.src),
            Self::Destination(net) => net.contains(packet.dst),
            Self::SourcePort(low, high) => packet.has_ports() && (low..=high).contains(&packet.src_port),
            Self::DestinationPort(low, high) => packet.has_ports() && (low..=high).contains(&packet.dst_port),
            Self::Proto(proto) => packet.proto.0 == proto,
            Self::Family(family) => packet.src.is_ipv4() == (family == 4),
            Self::Flags(flags) => packet.flags & flags == flags,
        }
    }

    fn row(self, wanted: bool) -> TraceRow {
        let mut row = TraceRow::ANY;
        let part = match self {
            Self::Source(net) => {
                (row.src, row.src_mask) = masked(net);
                TraceRow::NOT_SRC
            }
            Self::Destination(net) => {
                (row.dst, row.dst_mask) = masked(net);
                TraceRow::NOT_DST
            }
            Self::SourcePort(low, high) => {
                (row.src_low, row.src_high) = (low, high);
                TraceRow::NOT_SRC_PORT
            }
            Self::DestinationPort(low, high) => {
                (row.dst_low, row.dst_high) = (low, high);
                TraceRow::NOT_DST_PORT
            }
            Self::Proto(proto) => {
                row.proto = proto.into();
                TraceRow::NOT_PROTO
            }
            Self::Family(family) => {
                row.family = if family == 4 { FAMILY_IPV4 } else { FAMILY_IPV6 }.into();
                TraceRow::NOT_FAMILY
            }
            Self::Flags(flags) => {
                (row.flags_mask, row.flags) = (flags.into(), flags.into());
                TraceRow::NOT_FLAGS
            }
        };
        row.negated = if wanted { 0 } else { part };
        row
    }
}

fn masked(net: Net) -> (IpBytes, IpBytes) {
    let mask = IpBytes::from(net.mask());
    let ip = IpBytes::from(net.ip);
    let [a, b, c, d] = ip.0;
    let [ma, mb, mc, md] = mask.0;
    (IpBytes([a & ma, b & mb, c & mc, d & md]), mask)
}

#[cfg(test)]
#[path = "expression_tests.rs"]
mod tests;
