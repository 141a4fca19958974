//! Loaded programs that are used again: to verify them takes a second, in an emulated machine half
//! a minute.

use std::{
    ffi::{c_int, c_long},
    io,
    ops::{Deref, DerefMut},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    sync::{Mutex, PoisonError, atomic::Ordering},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::{MapData, MapInfo, MapType, RingBuf},
    util::nr_cpus,
};
use lb_userspace::{
    dataplane::{Dataplane, LoadOptions, MappedArray},
    reconcile::Plan,
};
use nix::libc;

/// Maps that a plan empties, beside those that hold nothing without their like; and the next hops,
/// which a new generation makes void.
const KEPT: [&str; 9] = [
    "ENDPOINTS",
    "GENERATION",
    "LISTENERS",
    "LISTENER_TRAFFIC",
    "NEXT_HOPS",
    "NIC_MACS",
    "SLOTS",
    "TARGETS",
    "TARGET_TRAFFIC",
];

/// `BPF_F_RDONLY_PROG`: what the agent set before it loaded the program.
const READ_ONLY: u32 = 1 << 7;

static POOL: Mutex<Vec<Ready>> = Mutex::new(Vec::new());

/// A program without a configuration, and without memory of one.
struct Ready {
    options: LoadOptions,
    dataplane: Dataplane,
    reports: RingBuf<MapData>,
}

/// A loaded program.
pub(super) struct Loaded(Option<Ready>);

impl Loaded {
    /// One that is there, or a new one.
    pub(super) fn new(options: &LoadOptions) -> Result<Self> {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = pool.iter().position(|ready| ready.options == *options) {
            return Ok(Self(Some(pool.swap_remove(place))));
        }
        drop(pool);
        let mut dataplane = Dataplane::load(options)?;
        let reports = dataplane.take_unresolved().context("taken once")?;
        Ok(Self(Some(Ready { options: *options, dataplane, reports })))
    }

    /// The oldest report of an address without a next hop.
    pub(super) fn report(&mut self) -> Option<Vec<u8>> {
        let ready = self.0.as_mut().expect("there until it is given back");
        ready.reports.next().map(|report| report.to_vec())
    }

    /// Gives it back. `plan` takes its configuration away.
    pub(super) fn give_back(&mut self, plan: &Plan) -> Result<()> {
        let mut ready = self.0.take().context("given back once")?;
        ready.dataplane.apply(plan)?;
        ready.dataplane.invalidate_next_hops();
        // Evictions are never forgotten.
        if ready.dataplane.flow_table_usage()?.iter().any(|usage| usage.evictions > 0) {
            return Ok(());
        }
        for id in map_ids(&mut ready.dataplane)? {
            clear(id).with_context(|| format!("empty map {id}"))?;
        }
        while ready.reports.next().is_some() {}
        POOL.lock().unwrap_or_else(PoisonError::into_inner).push(ready);
        Ok(())
    }
}

impl Deref for Loaded {
    type Target = Dataplane;

    fn deref(&self) -> &Dataplane {
        &self.0.as_ref().expect("there until it is given back").dataplane
    }
}

impl DerefMut for Loaded {
    fn deref_mut(&mut self) -> &mut Dataplane {
        &mut self.0.as_mut().expect("there until it is given back").dataplane
    }
}

/// The maps of all programs.
fn map_ids(dataplane: &mut Dataplane) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for (name, program) in dataplane.programs()? {
        ids.extend(program.map_ids()?.with_context(|| format!("maps of {name}"))?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Makes a map as it was when the program was loaded.
fn clear(id: u32) -> Result<()> {
    let map = MapInfo::from_id(id)?;
    let name = map.name_as_str().context("a name")?;
    if KEPT.contains(&name) || map.map_flags() & READ_ONLY != 0 {
        return Ok(());
    }
    let data = MapData::from_id(id)?;
    let fd = data.fd().as_fd();
    let (key, value) = (map.key_size() as usize, map.value_size() as usize);
    match map.map_type()? {
        MapType::Hash | MapType::LruHash | MapType::LpmTrie => remove_all(fd, key),
        MapType::Array => {
            let words = map.max_entries() * u32::try_from(value.div_ceil(8))?;
            let lines = words.div_ceil(8);
            // Within the pages of the map.
            let array = MappedArray::<[u64; 8]>::new(fd, lines)?;
            for line in 0..lines {
                for word in array.words(line) {
                    if word.load(Ordering::Relaxed) != 0 {
                        word.store(0, Ordering::Relaxed);
                    }
                }
            }
            Ok(())
        }
        MapType::PerCpuArray => {
            let cpus = nr_cpus().map_err(|(_, error)| error)?;
            let zeroes = vec![0; value.next_multiple_of(8) * cpus];
            (0..map.max_entries()).try_for_each(|n| update(fd, &n.to_ne_bytes(), &zeroes))
        }
        // Programs, devices, reports.
        _ => Ok(()),
    }
}

/// `union bpf_attr` of the commands on elements (linux/bpf.h).
#[repr(C)]
struct Element {
    map_fd: u32,
    zero: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

const UPDATE: c_int = 2;
const DELETE: c_int = 3;
const NEXT_KEY: c_int = 4;

fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> Result<()> {
    // SAFETY: both are as long as the map says, and are only read.
    let result = unsafe { bpf(UPDATE, map, key.as_ptr(), value.as_ptr()) };
    ensure!(result == 0, "update: {}", io::Error::last_os_error());
    Ok(())
}

fn remove_all(map: BorrowedFd<'_>, size: usize) -> Result<()> {
    let mut key = vec![0_u8; size];
    // SAFETY: `key` is as long as the map says; no key before it asks for the first.
    while unsafe { bpf(NEXT_KEY, map, std::ptr::null(), key.as_mut_ptr()) } == 0 {
        // SAFETY: as above.
        let result = unsafe { bpf(DELETE, map, key.as_ptr(), std::ptr::null()) };
        ensure!(result == 0, "remove: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// # Safety
///
/// `key` and `value` must be what the command wants of this map.
unsafe fn bpf(command: c_int, map: BorrowedFd<'_>, key: *const u8, value: *const u8) -> c_long {
    let element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        zero: 0,
        key: key as u64,
        value: value as u64,
        flags: 0,
    };
    // SAFETY: the attribute outlives the call and is as long as said; the rest is the caller's.
    unsafe { libc::syscall(libc::SYS_bpf, command, &raw const element, size_of::<Element>()) }
}
