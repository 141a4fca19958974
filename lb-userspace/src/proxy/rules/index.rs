//! Which rules a request can meet at all, by its host and the first segment of its path.
//!
//! Of a hundred rules most name their hosts, or begin their paths with words: those are found in
//! hash tables, and only the rest is tried one by one. What is looked up comes from clients, what
//! is stored from the configuration: nobody can make the tables degenerate.

use std::collections::HashMap;

use super::condition::{Condition, Values};

/// Host and segment; an empty one stands for any. (No rule asks for an empty host, and segments
/// have their first slash.)
type Key = (Box<[u8]>, Box<[u8]>);

/// Most keys of one rule; with more it is tried on every request.
const MOST_KEYS: usize = 64;

/// Places of rules in order of priority, by key.
#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    by_host: HashMap<Box<[u8]>, Segments>,
    any_host: Segments,
}

#[derive(Debug, Clone, Default)]
struct Segments {
    by_segment: HashMap<Box<[u8]>, Vec<u32>>,
    any_segment: Vec<u32>,
}

impl Index {
    /// Adds the rule of a place; places must come in ascending order.
    pub(super) fn add(&mut self, place: u32, conditions: &[Condition]) {
        for (host, segment) in keys(conditions) {
            let segments = if host.is_empty() {
                &mut self.any_host
            } else {
                self.by_host.entry(host).or_default()
            };
            let places = if segment.is_empty() {
                &mut segments.any_segment
            } else {
                segments.by_segment.entry(segment).or_default()
            };
            places.push(place);
        }
    }

    /// The places of all rules that a request may meet, ascending, and the first that does.
    pub(super) fn find(
        &self,
        host: &[u8],
        path: &[u8],
        mut meets: impl FnMut(u32) -> bool,
    ) -> Option<u32> {
        let segment = first_segment(path);
        let of_host = self.by_host.get(host);
        let mut lists: [&[u32]; 4] = [
            self.any_host.of(segment),
            &self.any_host.any_segment,
            of_host.map_or(&[], |segments| segments.of(segment)),
            of_host.map_or(&[], |segments| &segments.any_segment),
        ];
        loop {
            let list = lists
                .iter_mut()
                .filter(|list| !list.is_empty())
                .min_by_key(|list| list.first().copied())?;
            let (place, rest) = list.split_first()?;
            *list = rest;
            if meets(*place) {
                return Some(*place);
            }
        }
    }
}

impl Segments {
    fn of(&self, segment: &[u8]) -> &[u32] {
        if self.by_segment.is_empty() {
            return &[];
        }
        self.by_segment.get(segment).map_or(&[], Vec::as_slice)
    }
}

/// `/a` of `/a/b` and of `/a`.
fn first_segment(path: &[u8]) -> &[u8] {
    match path.iter().skip(1).position(|byte| *byte == b'/') {
        Some(at) => &path[..=at],
        None => path,
    }
}

/// What a rule is filed under: each request that meets it has one of these.
fn keys(conditions: &[Condition]) -> Vec<Key> {
    let any = || vec![Box::default()];
    let hosts = conditions
        .iter()
        .find_map(|condition| match condition {
            Condition::Host(values) => all(values, |wildcard| wildcard.exact().map(Into::into)),
            _ => None,
        })
        .unwrap_or_else(any);
    let segments = conditions
        .iter()
        .find_map(|condition| match condition {
            Condition::Path(values) => all(values, segment_of),
            _ => None,
        })
        .unwrap_or_else(any);
    if hosts.len() * segments.len() > MOST_KEYS {
        return vec![Key::default()];
    }
    let pairs = hosts
        .iter()
        .flat_map(|host| segments.iter().map(move |segment| (host.clone(), segment.clone())));
    let mut keys: Vec<Key> = pairs.collect();
    keys.sort();
    keys.dedup();
    keys
}

/// The keys of all values; `None` if one has none.
fn all(
    values: &Values,
    key: impl Fn(&super::pattern::Wildcard) -> Option<Box<[u8]>>,
) -> Option<Vec<Box<[u8]>>> {
    if !values.regexes.is_empty() {
        return None;
    }
    values.wildcards.iter().map(|wildcard| key(wildcard).filter(|key| !key.is_empty())).collect()
}

/// The first segment that every matching path has, if the pattern tells.
fn segment_of(wildcard: &super::pattern::Wildcard) -> Option<Box<[u8]>> {
    let known = match wildcard.exact() {
        Some(exact) => exact,
        None => {
            // The segment must end inside of what is known.
            let prefix = wildcard.literal_prefix();
            let end = prefix.iter().skip(1).position(|byte| *byte == b'/')?;
            &prefix[..=end]
        }
    };
    known.starts_with(b"/").then(|| first_segment(known).into())
}
