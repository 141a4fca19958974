//! A table that evicts what was used longest ago, on the host.

use std::collections::BTreeMap;

/// As the kernel's `BPF_MAP_TYPE_LRU_HASH`, but exact: a full table evicts the entry that was used
/// longest ago.
#[derive(Debug, Clone)]
pub struct Lru<K, V> {
    entries: BTreeMap<K, (u64, V)>,
    by_use: BTreeMap<u64, K>,
    uses: u64,
    capacity: usize,
    evictions: u64,
}

impl<K, V> Default for Lru<K, V> {
    /// Without a limit.
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
            capacity: usize::MAX,
            evictions: 0,
        }
    }
}

impl<K: Ord + Copy, V: Copy> Lru<K, V> {
    /// A table that holds so many entries.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Looks an entry up and marks it as used.
    pub fn get(&mut self, key: &K) -> Option<V> {
        let (last, value) = self.entries.get_mut(key)?;
        self.by_use.remove(last);
        self.uses += 1;
        *last = self.uses;
        self.by_use.insert(self.uses, *key);
        Some(*value)
    }

    /// Looks an entry up without a trace.
    pub fn peek(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(_, value)| value)
    }

    /// Adds or replaces an entry; a full table makes room first.
    pub fn insert(&mut self, key: K, value: V) {
        self.remove(&key);
        while self.entries.len() >= self.capacity {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.entries.remove(&oldest);
            self.evictions += 1;
        }
        self.uses += 1;
        self.by_use.insert(self.uses, key);
        self.entries.insert(key, (self.uses, value));
    }

    /// Removes an entry; whether it was there.
    pub fn remove(&mut self, key: &K) -> bool {
        let removed = self.entries.remove(key);
        removed.is_some_and(|(last, _)| self.by_use.remove(&last).is_some())
    }

    /// Removes all entries.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.by_use.clear();
    }

    /// All entries, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, (_, value))| (key, value))
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many entries had to make room.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn the_longest_unused_makes_room() {
        let mut table = Lru::with_capacity(2);
        table.insert('a', 1);
        table.insert('b', 2);
        assert_eq!(table.get(&'a'), Some(1));
        table.insert('c', 3);
        assert_eq!(table.peek(&'b'), None);
        assert_eq!((table.len(), table.evictions()), (2, 1));
        assert!(table.remove(&'a'));
        table.insert('d', 4);
        assert_eq!(table.iter().collect::<Vec<_>>(), [(&'c', &3), (&'d', &4)]);
        assert_eq!(table.evictions(), 1);
    }
}
