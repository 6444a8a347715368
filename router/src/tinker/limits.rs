//! How much of everything training clients may have.

/// Chosen at the start; their defaults are the command line's, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sessions of a server.
    pub sessions: u32,
    /// Models that one session trains at a time.
    pub models: u32,
    /// Calls of one model that may wait.
    pub queued_calls: u32,
    /// Bytes of one call.
    pub call_bytes: u64,
    /// Results that wait to be fetched; beyond, the oldest go.
    pub kept_results: u32,
}

impl Limits {
    pub const DEFAULT: Limits = Limits {
        sessions: 256,
        models: 64,
        queued_calls: 256,
        call_bytes: 64 << 20,
        kept_results: 100_000,
    };
}

impl Default for Limits {
    fn default() -> Limits {
        Limits::DEFAULT
    }
}
