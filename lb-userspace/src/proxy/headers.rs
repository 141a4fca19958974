//! Header fields between client and target.

/// The longest request line, bytes.
pub const MAX_REQUEST_LINE: usize = 16 * 1024;
