//! Everything that decides what happens to a packet.
#![no_std]
#![forbid(unsafe_code)]
