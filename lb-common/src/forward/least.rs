//! Least connections: of two targets the hash names, a new connection goes to the less loaded one.
//!
//! One choice by hash leaves the fullest of n targets about log n / log log n above the mean, the
//! better of two log log n (Mitzenmacher, "The power of two choices in randomized load balancing",
//! IEEE TPDS 12:10, 2001); and it holds with counts that are a little old, where everybody going to
//! the least loaded of all would run it over.

use crate::flow;
use crate::tables::Tables;

use super::select::slot;
use super::stage::Recall;

/// Slots that are tried for a second target of the first one's group: of two targets alone in the
/// ring, both are compared but once in 256 connections.
const ATTEMPTS: u32 = 8;

/// The target of a new connection for which the slot has `first`: itself, unless its group goes by
/// connections and another target of the group that the hash names has fewer.
///
/// Other slots are chosen from the other half of the hash, so that targets are drawn by their shares
/// of the ring; the first that holds another target of the group is the second choice. What a group
/// gets beside others is left to the first choice.
#[inline(never)]
pub fn better_of_two<T: Tables>(tables: &T, recall: &Recall, first: u32) -> u32 {
    let load = tables.load(first);
    if load.share.group == 0 {
        return first;
    }
    let mut hash = recall.hash;
    for _ in 0..ATTEMPTS {
        hash = flow::rehash(hash);
        let chosen = flow::slot((hash as u64) << 32, tables.ring_size());
        let Ok(slot) = slot(tables, recall.ring, chosen) else { return first };
        let second = slot.current;
        let other = tables.load(second);
        if second != first && other.share.group == load.share.group {
            return if other.is_less_than(&load) { second } else { first };
        }
    }
    first
}

/// A connection of a target has begun.
#[inline(always)]
pub fn opened<T: Tables>(tables: &T, target: u32) {
    count(tables, target, 1);
}

/// A connection of a target is over.
#[inline(always)]
pub fn ended<T: Tables>(tables: &T, target: u32) {
    count(tables, target, u64::MAX);
}

/// Nothing is counted where nothing is compared.
#[inline(always)]
fn count<T: Tables>(tables: &T, target: u32, change: u64) {
    if tables.load(target).share.group != 0 {
        tables.change_load(target, change);
    }
}
