//! Which trace something belongs to (W3C Trace Context, level 1), on its way between the crates and machines that do a part
//! of it. Not here: spans, which are those of the crate `tracing` with the target [`TARGET`], and who sends them on.

use std::fmt;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::str::FromStr;

/// Of spans that are sent on, and not logged. Their fields `otel.parent` and `otel.id` (a [`TraceContext`] each) say where they
/// belong, `otel.name` and `otel.kind` are a name and a kind that are not known where they are written; a span without
/// these belongs to the span that it has as its parent.
pub const TARGET: &str = "otlp";

/// A span, by the trace that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace: u128,
    /// 0: the trace, and no span of it.
    pub span: u64,
}

impl TraceContext {
    /// A span of a trace that begins with it.
    pub fn new() -> TraceContext {
        let trace = u128::from(random()) << 64 | u128::from(random());
        TraceContext { trace, span: 0 }.child()
    }

    /// The trace of all that has this name.
    pub fn named(name: &str) -> TraceContext {
        let half = |number: u8| {
            let mut hasher = DefaultHasher::new();
            (number, name).hash(&mut hasher);
            u128::from(hasher.finish())
        };
        let trace = half(0) << 64 | half(1);
        TraceContext { trace, span: 0 }
    }

    /// A new span of the same trace.
    pub fn child(self) -> TraceContext {
        TraceContext {
            span: random(),
            ..self
        }
    }
}

impl Default for TraceContext {
    fn default() -> TraceContext {
        TraceContext::new()
    }
}

/// Not 0, which is no id.
fn random() -> u64 {
    RandomState::new().hash_one(()).max(1)
}

/// As the header `traceparent` has it.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", self.trace, self.span)
    }
}

/// Why a `traceparent` begins no span here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// It is not as the standard has it.
    Malformed,
    /// Whoever asks keeps nothing of this trace.
    NotSampled,
}

impl FromStr for TraceContext {
    type Err = Unread;

    fn from_str(text: &str) -> Result<TraceContext, Unread> {
        let mut parts = text.trim().split('-');
        let mut hex = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits);
            let is_hex = |part: &&str| {
                part.bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
            };
            let part = part.filter(is_hex).ok_or(Unread::Malformed)?;
            u128::from_str_radix(part, 16).map_err(|_| Unread::Malformed)
        };
        let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        // A later version may have more parts.
        let has_more = parts.next().is_some();
        if version == 0xff || (version == 0 && has_more) || trace == 0 {
            return Err(Unread::Malformed);
        }
        match flags & 1 {
            0 => Err(Unread::NotSampled),
            _ => Ok(TraceContext {
                trace,
                span: span as u64,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_the_standard_has_them() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let known = TraceContext {
            trace: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736,
            span: 0x00f0_67aa_0ba9_02b7,
        };
        for (header, expected) in [
            (format!("00-{trace}-00f067aa0ba902b7-01"), Ok(known)),
            (format!(" 00-{trace}-00f067aa0ba902b7-03"), Ok(known)),
            (
                format!("cc-{trace}-00f067aa0ba902b7-01-what-comes-later"),
                Ok(known),
            ),
            (format!("00-{trace}-00f067aa0ba902b7-00"), Err(Unread::NotSampled)),
            (
                format!("00-{trace}-00f067aa0ba902b7-01-x"),
                Err(Unread::Malformed),
            ),
            (format!("ff-{trace}-00f067aa0ba902b7-01"), Err(Unread::Malformed)),
            (
                format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
                Err(Unread::Malformed),
            ),
            (
                format!("00-{}-00f067aa0ba902b7-01", trace.to_uppercase()),
                Err(Unread::Malformed),
            ),
            (format!("00-{trace}-00f067aa0ba902b-01"), Err(Unread::Malformed)),
            (String::new(), Err(Unread::Malformed)),
        ] {
            assert_eq!(header.parse(), expected, "{header}");
        }
        assert_eq!(known.to_string().parse(), Ok(known));
        assert_ne!(known.child(), known.child());
        assert_eq!(TraceContext::named("a"), TraceContext::named("a"));
    }
}
