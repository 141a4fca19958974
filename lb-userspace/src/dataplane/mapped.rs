//! Array maps in shared memory: the agent writes a word, the kernel's next lookup sees it.

use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use anyhow::Context as _;
use bytemuck::Pod;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An array map (`BPF_F_MMAPABLE`) of `T`. Each word of 8 bytes is written atomically.
pub struct MappedArray<T> {
    words: NonNull<AtomicU64>,
    bytes: NonZeroUsize,
    length: u32,
    _type: PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway, and only touched through atomics.
unsafe impl<T> Send for MappedArray<T> {}
// SAFETY: as for Send.
unsafe impl<T> Sync for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// The kernel rounds an element up to words.
    const STRIDE: usize = size_of::<T>().div_ceil(8);

    /// Maps an array of `length` elements.
    ///
    /// # Errors
    /// What mmap says; the map must have been made mappable.
    pub fn new(fd: impl AsFd, length: u32) -> anyhow::Result<Self> {
        let bytes =
            NonZeroUsize::new(Self::STRIDE * 8 * length as usize).context("an empty map")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, unmapped in `drop`.
        let words = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, fd, 0) }
            .context("map a BPF array into memory")?
            .cast();
        Ok(Self { words, bytes, length, _type: PhantomData })
    }

    /// The words of an element; none beyond the end.
    pub fn words(&self, index: u32) -> &[AtomicU64] {
        if index >= self.length {
            return &[];
        }
        let first = index as usize * Self::STRIDE;
        // SAFETY: within the mapping, which lives as long as `self`; mappings are page aligned.
        unsafe { std::slice::from_raw_parts(self.words.add(first).as_ptr(), Self::STRIDE) }
    }

    /// Writes an element, first word first.
    pub fn store(&self, index: u32, value: &T) {
        self.store_front(index, value, Self::STRIDE);
    }

    /// Writes the first `words` words of an element.
    pub fn store_front(&self, index: u32, value: &T, words: usize) {
        let bytes = bytemuck::bytes_of(value).chunks(8).take(words);
        for (word, bytes) in self.words(index).iter().zip(bytes) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(whole), Ordering::Release);
        }
    }

    /// Reads an element; `None` beyond the end.
    pub fn load(&self, index: u32) -> Option<T> {
        let words = self.words(index);
        if words.is_empty() {
            return None;
        }
        let bytes: Vec<u8> =
            words.iter().flat_map(|word| word.load(Ordering::Acquire).to_ne_bytes()).collect();
        Some(bytemuck::pod_read_unaligned(&bytes[..size_of::<T>()]))
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        fence(Ordering::SeqCst);
        // SAFETY: mapped in `new` with this size; nothing outlives `self`.
        // An error could only be that it is not mapped.
        let _ = unsafe { munmap(self.words.cast(), self.bytes.get()) };
    }
}
