//! Pseudo-random bytes that both sides can make from a seed.

use crc32fast::Hasher;

/// Bytes per piece; both sides must cut the stream alike.
pub const PIECE: usize = 64 * 1024;

/// A stream of `left` pseudo-random bytes, in pieces.
#[derive(Debug)]
pub struct Payload {
    random: fastrand::Rng,
    left: u64,
    piece: Vec<u8>,
}

impl Payload {
    /// The stream of this seed and length.
    pub fn new(seed: u64, len: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), left: len, piece: vec![0; PIECE] }
    }

    /// The next piece; `None` at the end.
    pub fn next_piece(&mut self) -> Option<&[u8]> {
        let len = usize::try_from(self.left).map_or(PIECE, |left| left.min(PIECE));
        self.left -= len as u64;
        let piece = &mut self.piece[..len];
        self.random.fill(piece);
        (len > 0).then_some(piece)
    }

    /// CRC-32 of the whole stream.
    pub fn checksum(seed: u64, len: u64) -> u32 {
        let mut stream = Self::new(seed, len);
        let mut hasher = Hasher::new();
        while let Some(piece) = stream.next_piece() {
            hasher.update(piece);
        }
        hasher.finalize()
    }
}

/// `len` pseudo-random bytes in one piece.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_has_its_length_and_depends_on_the_seed() {
        let lens = |len| {
            let mut stream = Payload::new(7, len);
            let mut lens = Vec::new();
            while let Some(piece) = stream.next_piece() {
                lens.push(piece.len());
            }
            lens
        };
        assert_eq!(lens(0), Vec::<usize>::new());
        assert_eq!(lens(PIECE as u64 * 2 + 3), [PIECE, PIECE, 3]);
        assert_eq!(Payload::checksum(7, 100_000), Payload::checksum(7, 100_000));
        assert_ne!(Payload::checksum(7, 100_000), Payload::checksum(8, 100_000));
        assert_eq!(Payload::checksum(7, 10), crc32fast::hash(&bytes(7, 10)));
    }
}
