//! What every eBPF object needs beside its programs and its licence.

/// The programs cannot panic; the verifier refuses the loop if they could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
