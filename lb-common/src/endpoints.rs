//! Filling the endpoint table, one write at a time, so that no reader ever misses an endpoint that
//! stays.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use crate::flow::HashKeys;
use crate::tables::{BUCKETS, Bucket, Endpoint, EndpointKey};

/// The endpoint table as it should be in the kernel.
#[derive(Debug, Clone)]
pub struct EndpointTable {
    keys: HashKeys,
    buckets: Vec<Bucket>,
    overflow: BTreeMap<EndpointKey, Endpoint>,
}

/// One write to the kernel's table. Writes must be carried out in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Replaces an endpoint in a bucket.
    Place {
        /// The bucket, less than [`BUCKETS`].
        bucket: u32,
        /// The place in it, 0 or 1.
        place: usize,
        /// What stands there from now on; kind 0: nothing.
        endpoint: Endpoint,
    },
    /// Adds or replaces an endpoint that found its bucket full.
    Overflow(Endpoint),
    /// Removes one.
    RemoveOverflow(EndpointKey),
}

impl EndpointTable {
    /// An empty table.
    pub fn new(keys: HashKeys) -> Self {
        Self { keys, buckets: vec![Bucket::default(); BUCKETS as usize], overflow: BTreeMap::new() }
    }

    /// A bucket; `None` from [`BUCKETS`] on.
    pub fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }

    /// An endpoint that found its bucket full.
    pub fn overflow(&self, key: &EndpointKey) -> Option<Endpoint> {
        self.overflow.get(key).copied()
    }

    /// Adds an endpoint, or replaces the one with its key.
    pub fn insert(&mut self, endpoint: Endpoint) -> Vec<Write> {
        let key = endpoint.key();
        let index = key.bucket(&self.keys);
        let [first, second] = self.buckets[index as usize].endpoints;
        let holds = |place: &Endpoint| place.kind() != 0 && place.key() == key;
        if holds(&first) {
            return vec![self.place(index, 0, endpoint)];
        }
        if holds(&second) {
            return vec![self.place(index, 1, endpoint)];
        }
        if !self.overflow.contains_key(&key) {
            if first.kind() == 0 {
                return vec![self.place(index, 0, endpoint)];
            }
            if second.kind() == 0 {
                return vec![self.place(index, 1, endpoint)];
            }
        }
        self.overflow.insert(key, endpoint);
        // First the entry, then the flag that leads to it.
        vec![Write::Overflow(endpoint), self.place(index, 0, first)]
    }

    /// Removes an endpoint; nothing to write if there is none.
    pub fn remove(&mut self, key: &EndpointKey) -> Vec<Write> {
        let index = key.bucket(&self.keys);
        if self.overflow.remove(key).is_some() {
            let [first, _] = self.buckets[index as usize].endpoints;
            return vec![self.place(index, 0, first), Write::RemoveOverflow(*key)];
        }
        let places = self.buckets[index as usize].endpoints;
        places
            .iter()
            .position(|place| place.kind() != 0 && place.key() == *key)
            .map(|place| self.place(index, place, Endpoint::default()))
            .into_iter()
            .collect()
    }

    /// Every endpoint.
    pub fn iter(&self) -> impl Iterator<Item = Endpoint> {
        let placed = self.buckets.iter().flat_map(|bucket| bucket.endpoints);
        let strip =
            |endpoint: Endpoint| Endpoint { kind: endpoint.kind & !Endpoint::OVERFLOW, ..endpoint };
        placed
            .filter(|endpoint| endpoint.kind() != 0)
            .map(strip)
            .chain(self.overflow.values().copied())
    }

    fn place(&mut self, bucket: u32, place: usize, mut endpoint: Endpoint) -> Write {
        endpoint.kind &= !Endpoint::OVERFLOW;
        let overflows = || self.overflow.keys().any(|key| key.bucket(&self.keys) == bucket);
        if place == 0 && !self.overflow.is_empty() && overflows() {
            endpoint.kind |= Endpoint::OVERFLOW;
        }
        self.buckets[bucket as usize].endpoints[place] = endpoint;
        Write::Place { bucket, place, endpoint }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::flow::TCP;
    use crate::wire::Be16;

    fn endpoint(n: u16, index: u32) -> Endpoint {
        let address = Ipv4Addr::new(10, 0, (n >> 8) as u8, n as u8).into();
        Endpoint {
            address,
            port: Be16::new(80),
            protocol: TCP,
            kind: Endpoint::LISTENER,
            index,
            ..Endpoint::default()
        }
    }

    /// Carries out writes and reads as the kernel does.
    struct Reader {
        buckets: Vec<Bucket>,
        overflow: BTreeMap<EndpointKey, Endpoint>,
    }

    impl Reader {
        fn apply(&mut self, write: Write) {
            match write {
                Write::Place { bucket, place, endpoint } => {
                    self.buckets[bucket as usize].endpoints[place] = endpoint;
                }
                Write::Overflow(endpoint) => {
                    self.overflow.insert(endpoint.key(), endpoint);
                }
                Write::RemoveOverflow(key) => {
                    self.overflow.remove(&key);
                }
            }
        }

        fn find(&self, key: &EndpointKey, keys: &HashKeys) -> Option<u32> {
            let bucket = &self.buckets[key.bucket(keys) as usize].endpoints;
            let place = bucket.iter().find(|e| e.kind() != 0 && e.key() == *key);
            if let Some(endpoint) = place {
                return Some(endpoint.index);
            }
            let continues = bucket[0].kind & Endpoint::OVERFLOW != 0;
            continues.then(|| self.overflow.get(key).map(|endpoint| endpoint.index)).flatten()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// After each single write, everything that stays is found.
        #[test]
        fn no_reader_misses_what_stays(
            steps in prop::collection::vec((any::<bool>(), 0_u16..6000, 1_u32..9), 1..200),
            base in 0_u16..6000,
        ) {
            let keys = HashKeys::from_seed(1);
            let mut table = EndpointTable::new(keys);
            let mut reader =
                Reader { buckets: table.buckets.clone(), overflow: BTreeMap::new() };
            let mut truth: BTreeMap<u16, u32> = BTreeMap::new();
            // Enough that buckets overflow.
            for n in base..base + 6000 {
                table.insert(endpoint(n, 1)).into_iter().for_each(|write| reader.apply(write));
                truth.insert(n, 1);
            }
            prop_assert!(!table.overflow.is_empty());
            for (add, offset, index) in steps {
                let n = base + offset;
                let writes = if add {
                    table.insert(endpoint(n, index))
                } else {
                    table.remove(&endpoint(n, 0).key())
                };
                let neighbours: Vec<_> = truth.iter().filter(|(other, _)| **other != n).collect();
                for write in writes {
                    reader.apply(write);
                    let bucket = endpoint(n, 0).key().bucket(&keys);
                    for (other, index) in &neighbours {
                        let key = endpoint(**other, 0).key();
                        if key.bucket(&keys) == bucket {
                            prop_assert_eq!(reader.find(&key, &keys), Some(**index));
                        }
                    }
                }
                if add { truth.insert(n, index); } else { truth.remove(&n); }
                let found = reader.find(&endpoint(n, 0).key(), &keys);
                prop_assert_eq!(found, truth.get(&n).copied());
            }
            prop_assert_eq!(table.iter().count(), truth.len());
        }
    }
}
