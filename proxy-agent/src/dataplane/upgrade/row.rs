//! A row of one version's layout as a row of another's.

use super::super::describe::{Entry, Place, Shape};

/// How the rows of a map become rows of its counterpart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Convert {
    key: Plan,
    value: Plan,
    stamp: Option<Stamp>,
}

/// Bytes that go from one place to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    from: Place,
    to: Place,
}

/// How the bytes of a key or value become those of its counterpart.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    moves: Vec<Move>,
    size: usize,
}

/// Where a value says when it was last used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(Place);

/// Names of fields that hold a time of CLOCK_MONOTONIC in nanoseconds.
const STAMPS: [&str; 2] = ["last_seen", "last_used"];

impl Convert {
    /// From one description to another; `None` when a description names bytes that the map does not have.
    pub(super) fn new(from: &Entry, to: &Entry, from_sizes: (usize, usize), to_sizes: (usize, usize)) -> Option<Self> {
        let stamp = STAMPS.iter().find_map(|name| to.value.get(*name)).filter(|place| place.size == 8);
        Some(Self {
            key: Plan::new(&from.key, &to.key, from_sizes.0, to_sizes.0)?,
            value: Plan::new(&from.value, &to.value, from_sizes.1, to_sizes.1)?,
            stamp: stamp.copied().map(Stamp),
        })
    }

    /// `None` when a number is too large for its place.
    pub(super) fn row(&self, key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        Some((self.key.apply(key)?, self.value.apply(value)?))
    }

    /// Where a converted value says when it was last used.
    pub(super) const fn stamp(&self) -> Option<Stamp> {
        self.stamp
    }
}

impl Stamp {
    /// The time of a value.
    pub(super) fn of(self, value: &[u8]) -> u64 {
        bytes(value, self.0).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
    }
}

impl Plan {
    fn new(from: &Shape, to: &Shape, from_size: usize, to_size: usize) -> Option<Self> {
        let within = |shape: &Shape, size| {
            shape.values().all(|place| place.offset.checked_add(place.size).is_some_and(|end| end <= size))
        };
        if !within(from, from_size) || !within(to, to_size) {
            return None;
        }
        let mut moves: Vec<Move> = Vec::new();
        let common = to.iter().filter_map(|(name, to)| Some(Move { from: *from.get(name)?, to: *to }));
        // What is neither of one size nor a number in both is not the same thing: it begins at zero.
        let mut common: Vec<Move> =
            common.filter(|m| m.from.size == m.to.size || m.from.size <= 8 && m.to.size <= 8).collect();
        common.sort_by_key(|m| m.to);
        for next in common {
            match moves.last_mut() {
                Some(last) if last.is_followed_by(&next) => {
                    last.from.size += next.from.size;
                    last.to.size += next.to.size;
                }
                _ => moves.push(next),
            }
        }
        Some(Self { moves, size: to_size })
    }

    fn apply(&self, from: &[u8]) -> Option<Vec<u8>> {
        let mut to = vec![0; self.size];
        for m in &self.moves {
            let target = to.get_mut(m.to.offset..m.to.offset + m.to.size)?;
            let source = bytes(from, m.from)?;
            if source.len() == target.len() {
                target.copy_from_slice(source);
            } else {
                resize(source, target)?;
            }
        }
        Some(to)
    }
}

impl Move {
    /// Whole and without a gap on both sides?
    fn is_followed_by(&self, next: &Self) -> bool {
        self.from.size == self.to.size
            && next.from.size == next.to.size
            && self.from.offset + self.from.size == next.from.offset
            && self.to.offset + self.to.size == next.to.offset
    }
}

fn bytes(all: &[u8], place: Place) -> Option<&[u8]> {
    all.get(place.offset..place.offset.checked_add(place.size)?)
}

/// A number in another width; `None` when it does not fit.
fn resize(source: &[u8], target: &mut [u8]) -> Option<()> {
    let mut number = [0; 8];
    if cfg!(target_endian = "little") {
        number.get_mut(..source.len())?.copy_from_slice(source);
        let (kept, rest) = number.split_at_checked(target.len())?;
        target.copy_from_slice(kept);
        rest.iter().all(|byte| *byte == 0).then_some(())
    } else {
        number.get_mut(8 - source.len()..)?.copy_from_slice(source);
        let (rest, kept) = number.split_at_checked(8 - target.len())?;
        target.copy_from_slice(kept);
        rest.iter().all(|byte| *byte == 0).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(fields: &[(&str, usize, usize)]) -> Shape {
        fields.iter().map(|(name, offset, size)| ((*name).to_owned(), Place { offset: *offset, size: *size })).collect()
    }

    fn converted(from: &[(&str, usize, usize)], to: &[(&str, usize, usize)], bytes: &[u8]) -> Option<Vec<u8>> {
        let (from, to) = (shape(from), shape(to));
        let size = |shape: &Shape| shape.values().map(|place| place.offset + place.size).max().unwrap_or(0);
        Plan::new(&from, &to, size(&from), size(&to)).expect("a plan").apply(bytes)
    }

    #[test]
    fn fields_keep_their_values_by_name() {
        let one = 1_u32.to_ne_bytes();
        let wide = 1_u64.to_ne_bytes();
        let huge = u64::MAX.to_ne_bytes();
        let table: [(&str, &[(&str, usize, usize)], &[(&str, usize, usize)], &[u8], Option<&[u8]>); 8] = [
            ("the same", &[("a", 0, 2), ("b", 2, 2)], &[("a", 0, 2), ("b", 2, 2)], &[1, 2, 3, 4], Some(&[1, 2, 3, 4])),
            (
                "another order",
                &[("a", 0, 2), ("b", 2, 2)],
                &[("b", 0, 2), ("a", 2, 2)],
                &[1, 2, 3, 4],
                Some(&[3, 4, 1, 2]),
            ),
            (
                "one more in the middle",
                &[("a", 0, 1), ("c", 1, 1)],
                &[("a", 0, 1), ("b", 1, 2), ("c", 3, 1)],
                &[1, 2],
                Some(&[1, 0, 0, 2]),
            ),
            (
                "one less",
                &[("a", 0, 1), ("b", 1, 2), ("c", 3, 1)],
                &[("a", 0, 1), ("c", 1, 1)],
                &[1, 9, 9, 2],
                Some(&[1, 2]),
            ),
            ("wider", &[("a", 0, 4)], &[("a", 0, 8)], &one, Some(&wide)),
            ("narrower", &[("a", 0, 8)], &[("a", 0, 4)], &wide, Some(&one)),
            ("too large", &[("a", 0, 8)], &[("a", 0, 4)], &huge, None),
            ("no number", &[("a", 0, 16)], &[("a", 0, 4)], &[7; 16], Some(&[0; 4])),
        ];
        for (name, from, to, bytes, expected) in table {
            assert_eq!(converted(from, to, bytes).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn what_lies_together_moves_together() {
        let fields = shape(&[("a", 0, 2), ("b", 2, 2), ("c", 4, 4)]);
        let all = Place { offset: 0, size: 8 };
        let plan = Plan::new(&fields, &fields, 8, 8);
        assert_eq!(plan, Some(Plan { moves: vec![Move { from: all, to: all }], size: 8 }));
    }

    #[test]
    fn a_description_of_bytes_that_are_not_there_is_refused() {
        let fields = shape(&[("a", 0, 8)]);
        assert_eq!(Plan::new(&fields, &fields, 4, 8), None);
        assert_eq!(Plan::new(&shape(&[("a", usize::MAX, 2)]), &fields, 8, 8), None);
    }

    #[test]
    fn the_later_use_is_found() {
        let entry = Entry { key: shape(&[("", 0, 4)]), value: shape(&[("x", 0, 8), ("last_seen", 8, 8)]) };
        let convert = Convert::new(&entry, &entry, (4, 16), (4, 16)).expect("a plan");
        let stamp = convert.stamp().expect("a field of that name");
        let value = [7_u64.to_ne_bytes(), 9_u64.to_ne_bytes()].concat();
        assert_eq!(stamp.of(&value), 9);
    }
}
