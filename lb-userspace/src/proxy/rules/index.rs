//! Which rules a request can meet at all, by its host and the first segment of its path.
//!
//! Of a hundred rules most name their hosts or domains, or begin their paths with words: those are
//! found in hash tables, and only the rest is tried one by one. What is looked up comes from
//! clients, what is stored from the configuration: nobody can make the tables degenerate.

use std::collections::HashMap;

use super::condition::{Condition, Values};
use super::pattern::Wildcard;

/// Most keys of one rule; with more it is tried on every request.
const MOST_KEYS: usize = 64;

/// Places of rules in order of priority, by what requests must have.
#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    by_host: HashMap<Box<[u8]>, Segments>,
    /// What hosts end with, from a dot on.
    by_domain: HashMap<Box<[u8]>, Segments>,
    longest_domain: usize,
    any_host: Segments,
}

#[derive(Debug, Clone, Default)]
struct Segments {
    by_segment: HashMap<Box<[u8]>, Vec<u32>>,
    any_segment: Vec<u32>,
}

/// What a rule wants of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum HostKey {
    Exact(Box<[u8]>),
    Domain(Box<[u8]>),
    Any,
}

/// The first segment that a rule wants; `None`: any.
type SegmentKey = Option<Box<[u8]>>;

impl Index {
    /// Adds the rule of a place; places must come in ascending order.
    pub(super) fn add(&mut self, place: u32, conditions: &[Condition]) {
        for (host, segment) in keys(conditions) {
            let segments = match host {
                HostKey::Exact(host) => self.by_host.entry(host).or_default(),
                HostKey::Domain(domain) => {
                    self.longest_domain = self.longest_domain.max(domain.len());
                    self.by_domain.entry(domain).or_default()
                }
                HostKey::Any => &mut self.any_host,
            };
            match segment {
                Some(segment) => segments.by_segment.entry(segment).or_default().push(place),
                None => segments.any_segment.push(place),
            }
        }
    }

    /// The first place of a rule that the request meets.
    pub(super) fn find(
        &self,
        host: &[u8],
        path: &[u8],
        mut meets: impl FnMut(u32) -> bool,
    ) -> Option<u32> {
        let segment = first_segment(path);
        let mut lists = Lists::default();
        self.any_host.lists(segment, &mut lists);
        if let Some(segments) = self.by_host.get(host) {
            segments.lists(segment, &mut lists);
        }
        // A host of thousands of dots costs no more than the configuration's longest domain.
        let start = host.len().saturating_sub(self.longest_domain);
        for dot in memchr::memchr_iter(b'.', &host[start..]) {
            if let Some(segments) = self.by_domain.get(&host[start + dot..]) {
                segments.lists(segment, &mut lists);
            }
        }
        lists.find(&mut meets)
    }
}

/// Lists that a request's rules are in; seldom more than the array holds, which costs no memory
/// of the heap.
#[derive(Default)]
struct Lists<'a> {
    first: [&'a [u32]; 6],
    count: usize,
    more: Vec<&'a [u32]>,
}

impl<'a> Lists<'a> {
    fn push(&mut self, list: &'a [u32]) {
        match self.first.get_mut(self.count) {
            Some(place) => *place = list,
            None => self.more.push(list),
        }
        self.count += 1;
    }

    /// The lowest place of any list that the closure takes.
    fn find(&mut self, meets: &mut impl FnMut(u32) -> bool) -> Option<u32> {
        if self.count == 1 {
            return self.first[0].iter().copied().find(|place| meets(*place));
        }
        let used = self.count.min(self.first.len());
        loop {
            let list = self.first[..used]
                .iter_mut()
                .chain(&mut self.more)
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
    /// Adds the lists that are for a segment.
    fn lists<'a>(&'a self, segment: &[u8], lists: &mut Lists<'a>) {
        if !self.any_segment.is_empty() {
            lists.push(&self.any_segment);
        }
        if !self.by_segment.is_empty()
            && let Some(places) = self.by_segment.get(segment)
        {
            lists.push(places);
        }
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
fn keys(conditions: &[Condition]) -> Vec<(HostKey, SegmentKey)> {
    let hosts = conditions.iter().find_map(|condition| match condition {
        Condition::Host(values) => all(values, host_key),
        _ => None,
    });
    let segments = conditions.iter().find_map(|condition| match condition {
        Condition::Path(values) => all(values, segment_key),
        _ => None,
    });
    let hosts = hosts.unwrap_or_else(|| vec![HostKey::Any]);
    let segments = match segments {
        Some(segments) => segments.into_iter().map(Some).collect(),
        None => vec![None],
    };
    if hosts.len() * segments.len() > MOST_KEYS {
        return vec![(HostKey::Any, None)];
    }
    let pairs = hosts
        .iter()
        .flat_map(|host| segments.iter().map(move |segment| (host.clone(), segment.clone())));
    let mut keys: Vec<_> = pairs.collect();
    keys.sort();
    keys.dedup();
    keys
}

/// The keys of all values; `None` if one has none.
fn all<K>(values: &Values, key: impl Fn(&Wildcard) -> Option<K>) -> Option<Vec<K>> {
    if !values.regexes.is_empty() {
        return None;
    }
    values.wildcards.iter().map(key).collect()
}

fn host_key(wildcard: &Wildcard) -> Option<HostKey> {
    if let Some(exact) = wildcard.exact() {
        return Some(HostKey::Exact(exact.into()));
    }
    let suffix = wildcard.literal_suffix();
    let dot = memchr::memchr(b'.', suffix)?;
    Some(HostKey::Domain(suffix[dot..].into()))
}

/// The first segment that every matching path has, if the pattern tells.
fn segment_key(wildcard: &Wildcard) -> Option<Box<[u8]>> {
    if let Some(exact) = wildcard.exact() {
        return Some(first_segment(exact).into());
    }
    // The segment must end inside of what is known.
    let prefix = wildcard.literal_prefix();
    let end = prefix.iter().skip(1).position(|byte| *byte == b'/')?;
    Some(prefix[..=end].into())
}
