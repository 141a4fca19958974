//! lb-common's types as aya knows map keys and values: the one bridge between the two.

/// A `T` whose bytes may be handed to the kernel.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Raw<T>(pub T);

// SAFETY: bytemuck has checked that every byte of `T` is initialised and any bytes are a `T`.
unsafe impl<T: bytemuck::Pod> aya::Pod for Raw<T> {}
