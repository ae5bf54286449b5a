//! What the servers and clients say to each other.
//!
//! ```text
//!   TCP  client: Mode ─▶ server: Greeting, then by mode
//!        Exchange  client: `up` bytes ─▶ server: Receipt, `down` bytes ─▶ client closes
//!        Echo      client: frame ─▶ server: the same frame, any number of times; none is a bare request-response
//!        Farewell  server: closes at once
//!        Sink      client: bytes until it shuts down ─▶ server: Receipt
//!   UDP  request: any bytes (the first 16 are its tag) ─▶ reply: UdpReply, then the request's bytes from there on
//! ```

use std::io::{self, Read, Write};
use std::net::SocketAddr;

/// Bytes of the header that names a [`Mode`].
pub const HEADER_LEN: usize = 32;
/// Bytes of an echo frame: number, then filler derived from it.
pub const FRAME_LEN: usize = 64;
/// Bytes at the start of a UDP request that its reply repeats.
pub const TAG_LEN: usize = 16;

const TCP_MAGIC: [u8; 4] = *b"PTT1";
const UDP_MAGIC: [u8; 4] = *b"PTU1";

/// What a TCP client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// So many bytes up, then so many down.
    Exchange {
        /// Bytes to the server.
        up: u64,
        /// Bytes to the client.
        down: u64,
        /// Seed of both streams: as it is up, inverted down.
        seed: u64,
    },
    /// Frames back as they come.
    Echo,
    /// Bytes until the client shuts down, unchecked.
    Sink,
    /// Nothing more: the server closes first, so its end waits in TIME_WAIT.
    Farewell,
}

impl Mode {
    /// As bytes.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let (mode, up, down, seed) = match self {
            Self::Exchange { up, down, seed } => (0, up, down, seed),
            Self::Echo => (1, 0, 0, 0),
            Self::Sink => (2, 0, 0, 0),
            Self::Farewell => (3, 0, 0, 0),
        };
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&TCP_MAGIC);
        header[4] = mode;
        header[8..16].copy_from_slice(&up.to_be_bytes());
        header[16..24].copy_from_slice(&down.to_be_bytes());
        header[24..].copy_from_slice(&seed.to_be_bytes());
        header
    }

    /// From bytes; `None` when they are no header.
    pub fn decode(header: &[u8; HEADER_LEN]) -> Option<Self> {
        let number = |at: usize| header[at..at + 8].iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
        match (header.starts_with(&TCP_MAGIC), header[4]) {
            (true, 0) => Some(Self::Exchange { up: number(8), down: number(16), seed: number(24) }),
            (true, 1) => Some(Self::Echo),
            (true, 2) => Some(Self::Sink),
            (true, 3) => Some(Self::Farewell),
            _ => None,
        }
    }
}

/// What a TCP server says of itself and of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Name of the server.
    pub server: String,
    /// The client's address as the server sees it.
    pub peer: SocketAddr,
}

impl Greeting {
    /// Writes it, in one piece.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(64);
        put_text(&mut bytes, &self.server);
        put_text(&mut bytes, &self.peer.to_string());
        to.write_all(&bytes)
    }

    /// Reads it.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let mut text = || {
            let mut len = [0];
            from.read_exact(&mut len)?;
            let mut text = vec![0; usize::from(len[0])];
            from.read_exact(&mut text)?;
            String::from_utf8(text).map_err(|_| invalid("a greeting"))
        };
        let server = text()?;
        let peer = text()?.parse().map_err(|_| invalid("a peer address"))?;
        Ok(Self { server, peer })
    }
}

/// What a server received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Bytes.
    pub len: u64,
    /// CRC-32 of them; 0 in sink mode.
    pub crc: u32,
}

impl Receipt {
    /// Writes it.
    pub fn write(self, mut to: impl Write) -> io::Result<()> {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&self.len.to_be_bytes());
        bytes[8..].copy_from_slice(&self.crc.to_be_bytes());
        to.write_all(&bytes)
    }

    /// Reads it.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let mut len = [0; 8];
        let mut crc = [0; 4];
        from.read_exact(&mut len)?;
        from.read_exact(&mut crc)?;
        Ok(Self { len: u64::from_be_bytes(len), crc: u32::from_be_bytes(crc) })
    }
}

/// The echo frame of a number.
pub fn frame(number: u64) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    for (at, word) in (0..).zip(frame.chunks_exact_mut(8)) {
        word.copy_from_slice(&number.wrapping_mul(at * 2 + 1).to_be_bytes());
    }
    frame
}

/// The number of an echo frame; `None` when it is damaged.
pub fn frame_number(bytes: &[u8; FRAME_LEN]) -> Option<u64> {
    let number = bytes[..8].iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
    (frame(number) == *bytes).then_some(number)
}

/// Start of a UDP reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpReply {
    /// Name of the server.
    pub server: String,
    /// The client's address as the server sees it.
    pub peer: SocketAddr,
    /// First bytes of the request, padded with zeros.
    pub tag: [u8; TAG_LEN],
    /// Bytes of the request.
    pub request_len: u16,
    /// CRC-32 of the request.
    pub request_crc: u32,
}

impl UdpReply {
    /// The tag of a request.
    pub fn tag(request: &[u8]) -> [u8; TAG_LEN] {
        let mut tag = [0; TAG_LEN];
        let len = request.len().min(TAG_LEN);
        tag[..len].copy_from_slice(&request[..len]);
        tag
    }

    /// The datagram that answers `request`: at least as long as it, and equal to it behind the reply's fields.
    pub fn datagram(&self, request: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(request.len().max(96));
        bytes.extend(UDP_MAGIC);
        bytes.extend(self.tag);
        bytes.extend(self.request_len.to_be_bytes());
        bytes.extend(self.request_crc.to_be_bytes());
        put_text(&mut bytes, &self.server);
        put_text(&mut bytes, &self.peer.to_string());
        if let Some(rest) = request.get(bytes.len()..) {
            bytes.extend(rest);
        }
        bytes
    }

    /// Reads a datagram; also gives what follows the fields, and its offset. `None` when it is no reply.
    pub fn read(datagram: &[u8]) -> Option<(Self, &[u8], usize)> {
        let (magic, rest) = datagram.split_first_chunk::<4>()?;
        let (tag, rest) = rest.split_first_chunk::<TAG_LEN>()?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        let (server, rest) = take_text(rest)?;
        let (peer, rest) = take_text(rest)?;
        let reply = Self {
            server: server.to_owned(),
            peer: peer.parse().ok()?,
            tag: *tag,
            request_len: u16::from_be_bytes(*len),
            request_crc: u32::from_be_bytes(*crc),
        };
        (*magic == UDP_MAGIC).then_some((reply, rest, datagram.len() - rest.len()))
    }
}

/// Puts a text with its length in one byte; longer ones are cut.
fn put_text(bytes: &mut Vec<u8>, text: &str) {
    let len = u8::try_from(text.len()).unwrap_or(u8::MAX);
    bytes.push(len);
    bytes.extend(&text.as_bytes()[..usize::from(len)]);
}

fn take_text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*len))?;
    Some((std::str::from_utf8(text).ok()?, rest))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_greetings_come_back() {
        let modes = [Mode::Exchange { up: 1 << 40, down: 3, seed: u64::MAX }, Mode::Echo, Mode::Sink];
        assert_eq!(modes.map(|mode| Mode::decode(&mode.encode())), modes.map(Some));
        assert_eq!(Mode::decode(&[0; HEADER_LEN]), None);

        let greeting = Greeting { server: "a".into(), peer: "[fd00::1]:80".parse().expect("address") };
        let mut bytes = Vec::new();
        greeting.write(&mut bytes).expect("memory");
        assert_eq!(Greeting::read(&bytes[..]).expect("whole"), greeting);
    }

    #[test]
    fn frames_show_damage() {
        let mut bytes = frame(41);
        assert_eq!(frame_number(&bytes), Some(41));
        bytes[FRAME_LEN - 1] ^= 1;
        assert_eq!(frame_number(&bytes), None);
    }

    #[test]
    fn udp_reply_repeats_the_tail() {
        let request: Vec<u8> = (0..=255).collect();
        let reply = UdpReply {
            server: "b".into(),
            peer: "10.0.0.1:5".parse().expect("address"),
            tag: UdpReply::tag(&request),
            request_len: 256,
            request_crc: 9,
        };
        let datagram = reply.datagram(&request);
        let (read, tail, at) = UdpReply::read(&datagram).expect("a reply");
        assert_eq!((read, tail, datagram.len()), (reply, &request[at..], 256));
        assert_eq!(UdpReply::read(&request), None);
    }
}
