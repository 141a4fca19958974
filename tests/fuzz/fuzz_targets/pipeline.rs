//! An IPv4 header read with network-types, as the pipeline does, says what etherparse says.
#![no_main]

use etherparse::Ipv4HeaderSlice;
use libfuzzer_sys::fuzz_target;
use network_types::ip::Ipv4Hdr;

fuzz_target!(|frame: &[u8]| {
    let Ok(expected) = Ipv4HeaderSlice::from_slice(frame) else { return };
    let header = read(expected.slice());
    assert_eq!(header.version(), 4);
    // In bytes.
    assert_eq!(usize::from(header.ihl()), expected.slice().len());
    assert_eq!(header.tot_len(), expected.total_len());
    assert_eq!(header.id(), expected.identification());
    assert_eq!(header.frag_offset(), expected.fragments_offset().value());
    assert_eq!(header.ttl, expected.ttl());
    assert_eq!(header.proto, expected.protocol().0);
    assert_eq!(header.checksum(), expected.header_checksum());
    assert_eq!(header.src_addr(), expected.source_addr());
    assert_eq!(header.dst_addr(), expected.destination_addr());
});

/// The fixed part, as the wire has it; `bytes` holds at least 20.
fn read(bytes: &[u8]) -> Ipv4Hdr {
    Ipv4Hdr {
        vihl: bytes[0],
        tos: bytes[1],
        tot_len: [bytes[2], bytes[3]],
        id: [bytes[4], bytes[5]],
        frags: [bytes[6], bytes[7]],
        ttl: bytes[8],
        proto: bytes[9],
        check: [bytes[10], bytes[11]],
        src_addr: [bytes[12], bytes[13], bytes[14], bytes[15]],
        dst_addr: [bytes[16], bytes[17], bytes[18], bytes[19]],
    }
}
