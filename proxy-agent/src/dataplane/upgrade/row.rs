//! A row of one version's layout as a row of another's.

use super::super::describe::{Entry, Place, Shape};

/// How the rows of a map become rows of its counterpart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Convert {
    key: Plan,
    value: Plan,
    /// Service port of a flow.
    service: Option<Place>,
    /// CLOCK_MONOTONIC in nanoseconds of the last use.
    used: Option<Place>,
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

impl Convert {
    /// From one description to another; `None` when a description names bytes that the map does not have.
    pub(super) fn new(from: &Entry, to: &Entry, from_sizes: (usize, usize), to_sizes: (usize, usize)) -> Option<Self> {
        Some(Self {
            key: Plan::new(&from.key, &to.key, from_sizes.0, to_sizes.0)?,
            value: Plan::new(&from.value, &to.value, from_sizes.1, to_sizes.1)?,
            service: to.value.get("service").copied(),
            used: ["last_seen", "last_used"].iter().find_map(|name| to.value.get(*name).copied()),
        })
    }

    /// `None` when a number is too large for its place.
    pub(super) fn row(&self, key: &[u8], value: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        Some((self.key.apply(key)?, self.value.apply(value)?))
    }

    /// Of two values under one key, both in our layout: is the first to be kept? Later use is; and in any case a flow
    /// through a Service in place of a direct one, for which our programs took its packets while they did not know it.
    pub(super) fn is_better(&self, one: &[u8], other: &[u8]) -> bool {
        let is_of_service = |value| self.service.and_then(|place| number(value, place)).is_some_and(|id| id != 0);
        let used = |value| self.used.and_then(|place| number(value, place));
        match (is_of_service(one), is_of_service(other)) {
            (true, false) => true,
            (false, true) => false,
            _ => used(one) > used(other),
        }
    }
}

/// A number of at most eight bytes.
fn number(value: &[u8], place: Place) -> Option<u64> {
    let mut wide = [0; 8];
    resize(bytes(value, place)?, &mut wide)?;
    Some(u64::from_ne_bytes(wide))
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

    /// Name, offset and size of each.
    type Fields<'a> = &'a [(&'a str, usize, usize)];

    fn shape(fields: Fields<'_>) -> Shape {
        fields.iter().map(|(name, offset, size)| ((*name).to_owned(), Place { offset: *offset, size: *size })).collect()
    }

    fn converted(from: Fields<'_>, to: Fields<'_>, bytes: &[u8]) -> Option<Vec<u8>> {
        let (from, to) = (shape(from), shape(to));
        let size = |shape: &Shape| shape.values().map(|place| place.offset + place.size).max().unwrap_or(0);
        Plan::new(&from, &to, size(&from), size(&to)).expect("a plan").apply(bytes)
    }

    /// A name, the fields of both layouts, the bytes in the first, and in the second if they can be carried.
    type Case<'a> = (&'a str, Fields<'a>, Fields<'a>, &'a [u8], Option<&'a [u8]>);

    #[test]
    fn fields_keep_their_values_by_name() {
        let one = 1_u32.to_ne_bytes();
        let wide = 1_u64.to_ne_bytes();
        let huge = u64::MAX.to_ne_bytes();
        let table: [Case<'_>; 8] = [
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
    fn of_two_values_the_better_is_kept() {
        let entry = |value: Fields<'_>| Entry { key: shape(&[("", 0, 4)]), value: shape(value) };
        let flow = entry(&[("last_seen", 0, 8), ("service", 8, 4)]);
        let flow = Convert::new(&flow, &flow, (4, 12), (4, 12)).expect("a plan");
        let value = |used: u64, service: u32| [&used.to_ne_bytes()[..], &service.to_ne_bytes()].concat();
        let table = [
            ("later", value(2, 7), value(1, 7), true),
            ("as late", value(2, 7), value(2, 7), false),
            ("earlier", value(1, 7), value(2, 7), false),
            ("earlier, of a Service", value(1, 7), value(2, 0), true),
            ("later, direct", value(2, 0), value(1, 7), false),
        ];
        for (name, one, other, expected) in table {
            assert_eq!(flow.is_better(&one, &other), expected, "{name}");
        }
        let plain = entry(&[("", 0, 4)]);
        let plain = Convert::new(&plain, &plain, (4, 4), (4, 4)).expect("a plan");
        assert!(!plain.is_better(&[1; 4], &[2; 4]), "what says nothing of itself stays");
    }
}
