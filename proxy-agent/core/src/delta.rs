//! The difference between what is wanted and what is there, kept up to date instead of computed.

use std::collections::BTreeMap;

/// Desired rows, and those rows where the other side does not hold, for certain, what is desired. No I/O.
///
/// Only the difference is kept twice: a table that is in step costs its rows once. A write that failed may have taken
/// effect or not, so a row may have several possible values on the other side; it stays open until a write succeeds,
/// even when the desired value has by then gone back to what it was.
#[derive(Clone, Debug)]
pub struct Delta<K, V> {
    desired: BTreeMap<K, V>,
    /// Row → every value (`None` = absent) that the other side may hold. Never exactly `[desired]`.
    open: BTreeMap<K, Vec<Option<V>>>,
}

impl<K, V> Default for Delta<K, V> {
    fn default() -> Self {
        Self { desired: BTreeMap::new(), open: BTreeMap::new() }
    }
}

impl<K: Ord + Clone, V: PartialEq + Clone> Delta<K, V> {
    /// Between two tables.
    pub fn new(desired: BTreeMap<K, V>, actual: BTreeMap<K, V>) -> Self {
        let mut delta = Self { desired, open: BTreeMap::new() };
        delta.load(actual);
        delta
    }

    /// The other side is now known to hold exactly this.
    pub fn load(&mut self, mut actual: BTreeMap<K, V>) {
        self.open.clear();
        for (key, value) in &self.desired {
            let held = actual.remove(key);
            if held.as_ref() != Some(value) {
                self.open.insert(key.clone(), vec![held]);
            }
        }
        self.open.extend(actual.into_iter().map(|(key, value)| (key, vec![Some(value)])));
    }

    /// Desires a row.
    pub fn want(&mut self, key: K, value: V) {
        if self.desired.get(&key) == Some(&value) {
            return;
        }
        let old = self.desired.insert(key.clone(), value);
        self.reopen(key, old);
    }

    /// Desires a row to be absent.
    pub fn unwant(&mut self, key: &K) {
        if let Some(old) = self.desired.remove(key) {
            self.reopen(key.clone(), Some(old));
        }
    }

    /// A write of `value` (`None` = a deletion) succeeded.
    pub fn succeeded(&mut self, key: &K, value: Option<V>) {
        if value.as_ref() == self.desired.get(key) {
            self.open.remove(key);
        } else {
            self.open.insert(key.clone(), vec![value]);
        }
    }

    /// A write of `value` (`None` = a deletion) failed: it may have taken effect or not.
    pub fn failed(&mut self, key: &K, value: Option<V>) {
        let desired = self.desired.get(key);
        let held = self.open.entry(key.clone()).or_insert_with(|| vec![desired.cloned()]);
        if !held.contains(&value) {
            held.push(value);
        }
    }

    /// The desired rows.
    pub const fn desired(&self) -> &BTreeMap<K, V> {
        &self.desired
    }

    /// Rows to write (`Some`) and to delete (`None`).
    pub fn pending(&self) -> impl Iterator<Item = (&K, Option<&V>)> {
        self.open.keys().map(|key| (key, self.desired.get(key)))
    }

    /// Number of rows to write or to delete.
    pub fn pending_len(&self) -> usize {
        self.open.len()
    }

    /// The other side holds, for certain, what is desired.
    pub fn settled(&self, key: &K) -> bool {
        !self.open.contains_key(key)
    }

    /// The other side holds this row for certain, and it is desired.
    pub fn present(&self, key: &K) -> bool {
        self.settled(key) && self.desired.contains_key(key)
    }

    /// The other side holds this row for certain, whatever it says.
    pub fn held(&self, key: &K) -> bool {
        match self.open.get(key) {
            None => self.desired.contains_key(key),
            Some(values) => values.iter().all(Option::is_some),
        }
    }

    /// Every value that the other side may hold in this row.
    pub fn possible(&self, key: &K) -> impl Iterator<Item = &V> {
        let open = self.open.get(key);
        let settled = if open.is_none() { self.desired.get(key) } else { None };
        open.into_iter().flatten().flatten().chain(settled)
    }

    /// Every value that the other side may hold in rows that are not settled.
    pub fn unsettled(&self) -> impl Iterator<Item = &V> {
        self.open.values().flatten().flatten()
    }

    /// The desired value was `old` and is another now.
    fn reopen(&mut self, key: K, old: Option<V>) {
        match self.open.get(&key).map(Vec::as_slice) {
            None => {
                self.open.insert(key, vec![old]);
            }
            Some([held]) if held.as_ref() == self.desired.get(&key) => {
                self.open.remove(&key);
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Rows<V> = Vec<(u32, V)>;

    /// Shape of a delta: desired rows, then open rows with what may be there.
    fn shape(delta: &Delta<u32, char>) -> (Rows<char>, Rows<Vec<Option<char>>>) {
        (
            delta.desired.iter().map(|(k, v)| (*k, *v)).collect(),
            delta.open.iter().map(|(k, v)| (*k, v.clone())).collect(),
        )
    }

    #[test]
    fn meets_again_without_work() {
        let mut delta = Delta::new(BTreeMap::new(), BTreeMap::from([(1, 'a'), (2, 'b')]));
        delta.want(1, 'a');
        assert_eq!(shape(&delta), (vec![(1, 'a')], vec![(2, vec![Some('b')])]));
        delta.want(1, 'x');
        delta.want(3, 'c');
        assert_eq!(delta.pending().collect::<Vec<_>>(), [(&1, Some(&'x')), (&2, None), (&3, Some(&'c'))]);
        delta.want(1, 'a');
        delta.unwant(&3);
        delta.want(2, 'b');
        assert_eq!(shape(&delta), (vec![(1, 'a'), (2, 'b')], vec![]));
    }

    #[test]
    fn a_failed_write_stays_open_even_when_its_cause_is_gone() {
        let mut delta = Delta::new(BTreeMap::from([(1, 'a')]), BTreeMap::from([(1, 'a')]));
        delta.want(1, 'b');
        delta.failed(&1, Some('b'));
        delta.failed(&1, Some('b'));
        delta.want(1, 'a');
        assert_eq!(shape(&delta), (vec![(1, 'a')], vec![(1, vec![Some('a'), Some('b')])]));
        assert_eq!(delta.possible(&1).collect::<String>(), "ab");
        assert!(!delta.settled(&1));
        delta.succeeded(&1, Some('a'));
        assert_eq!(shape(&delta), (vec![(1, 'a')], vec![]));
        assert_eq!(delta.possible(&1).collect::<String>(), "a");
    }

    #[test]
    fn a_failed_deletion_stays_open() {
        let mut delta = Delta::new(BTreeMap::new(), BTreeMap::from([(1, 'a')]));
        delta.failed(&1, None);
        assert_eq!(delta.pending().collect::<Vec<_>>(), [(&1, None)]);
        delta.want(1, 'a');
        assert_eq!(delta.pending().collect::<Vec<_>>(), [(&1, Some(&'a'))], "it may be deleted already");
        delta.succeeded(&1, Some('a'));
        assert!(delta.present(&1));
    }
}
