//! What a target's tables hold, and the writes from one content to another. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lb_common::tables::EndpointKey;
use lb_common::target::tables::{
    CLASS_WORDS, CLASSES, CLASSES_IN_WORD, DENIED, Settings, class_index,
};
use lb_common::wire::{Address, Be16};

/// A sender of a class: what it is known by, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sender {
    /// One of [`space`](lb_common::target::tables::space).
    pub space: u32,
    /// The prefix's address.
    pub address: Address,
    /// The prefix's length, 0 to 128.
    pub bits: u8,
}

/// Everything a target's tables should hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// What to do.
    pub settings: Settings,
    /// Where tunnels end.
    pub tunnel_ends: BTreeSet<EndpointKey>,
    /// The class of every place, by [`class_index`].
    pub places: Arc<[u16]>,
    /// The senders of every class.
    pub classes: BTreeMap<u16, Arc<BTreeSet<Sender>>>,
}

impl Default for Tables {
    /// As the kernel makes them: nothing is unwrapped, nothing enforced.
    fn default() -> Self {
        Self {
            settings: Settings::default(),
            tunnel_ends: BTreeSet::new(),
            places: vec![DENIED; CLASSES as usize].into(),
            classes: BTreeMap::new(),
        }
    }
}

impl Tables {
    /// The class of a port, 0 for protocols without ports.
    pub fn class(&self, is_v4: bool, protocol: u8, port: u16) -> u16 {
        self.places[class_index(is_v4, protocol, Be16::new(port)) as usize]
    }

    fn word(&self, index: u32) -> u64 {
        let first = (index * CLASSES_IN_WORD) as usize;
        let places = self.places[first..first + CLASSES_IN_WORD as usize].iter();
        places.rev().fold(0, |word, class| word << 16 | u64::from(*class))
    }
}

/// Writes, to be carried out in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The writes.
    pub steps: Vec<Step>,
}

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the documentation")]
pub enum Step {
    AddSender(u16, Sender),
    RemoveSender(u16, Sender),
    /// Four places at once, by number of the word.
    SetPlaces(u32, u64),
    AddTunnelEnd(EndpointKey),
    RemoveTunnelEnd(EndpointKey),
    SetSettings(Settings),
}

/// The plan that turns `from` into `to`. A class is complete before a port leads to it, and stays
/// so until no port does.
pub fn diff(from: &Tables, to: &Tables) -> Plan {
    let mut steps = Vec::new();
    for (class, sender) in missing(to, from) {
        steps.push(Step::AddSender(class, sender));
    }
    if !Arc::ptr_eq(&from.places, &to.places) {
        let changed = (0..CLASS_WORDS).map(|index| (index, to.word(index)));
        let changed = changed.filter(|(index, word)| from.word(*index) != *word);
        steps.extend(changed.map(|(index, word)| Step::SetPlaces(index, word)));
    }
    steps.extend(to.tunnel_ends.difference(&from.tunnel_ends).copied().map(Step::AddTunnelEnd));
    if from.settings != to.settings {
        steps.push(Step::SetSettings(to.settings));
    }
    steps.extend(from.tunnel_ends.difference(&to.tunnel_ends).copied().map(Step::RemoveTunnelEnd));
    for (class, sender) in missing(from, to) {
        steps.push(Step::RemoveSender(class, sender));
    }
    Plan { steps }
}

/// The senders of `tables` that `other` has not.
fn missing(tables: &Tables, other: &Tables) -> Vec<(u16, Sender)> {
    let empty = BTreeSet::new();
    let mut found = Vec::new();
    for (class, senders) in &tables.classes {
        let others = other.classes.get(class);
        if others.is_some_and(|others| Arc::ptr_eq(others, senders)) {
            continue;
        }
        let others = others.map_or(&empty, |others| &**others);
        found.extend(senders.difference(others).map(|sender| (*class, *sender)));
    }
    found
}

#[cfg(test)]
mod tests {
    use lb_common::flow::{TCP, UDP};
    use lb_common::target::tables::FIRST_CLASS;

    use super::*;

    fn tables(class: u16, port: u16, host: u8) -> Tables {
        let mut tables = Tables::default();
        let address = std::net::Ipv4Addr::new(10, 0, 0, host).into();
        let sender = Sender { space: 0, address, bits: 128 };
        tables.classes.insert(class, Arc::new([sender].into()));
        let mut places = tables.places.to_vec();
        places[class_index(true, TCP, Be16::new(port)) as usize] = class;
        tables.places = places.into();
        tables
    }

    #[test]
    fn a_class_is_there_before_and_after_a_port_leads_to_it() {
        let (old, new) = (tables(FIRST_CLASS, 80, 1), tables(FIRST_CLASS + 1, 80, 2));
        let steps = diff(&old, &new).steps;
        let [Step::AddSender(4, _), Step::SetPlaces(20, 4), Step::RemoveSender(3, _)] = steps[..]
        else {
            panic!("{steps:?}");
        };
        assert_eq!(diff(&new, &new), Plan::default());
    }

    #[test]
    fn a_word_has_its_places_from_the_lowest_bits_on() {
        let tables = tables(FIRST_CLASS, 83, 1);
        assert_eq!(tables.word(20), 3 << 48);
        assert_eq!((tables.class(true, TCP, 83), tables.class(true, UDP, 83)), (3, DENIED));
    }
}
