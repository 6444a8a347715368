//! Which member a request goes to: the one where it is least work. Pure: numbers in, a number out. Not here: where the
//! numbers come from.

/// A member as one request sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct View {
    /// Sequences it has, as far as is known.
    pub sequences: u32,
    /// Sequences it runs at once; more wait.
    pub slots: u32,
    /// Tokens of the prompt whose KV it probably holds.
    pub cached_tokens: u32,
    /// Tokens its KV cache has room for.
    pub free_tokens: u64,
    pub adapter: Adapter,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adapter {
    /// The base, or resident.
    #[default]
    Ready,
    /// It must be read, perhaps fetched.
    Absent,
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    pub prompt_tokens: u32,
    /// Prompt and answer.
    pub tokens: u32,
}

/// What things cost, in prompt tokens that could be computed instead. A sequence beside others shares every step with
/// them; one that waits must see another end first.
const SEQUENCE_COST: u64 = 64;
const WAITING_COST: u64 = 512;
const ADAPTER_COST: u64 = 512;
/// It would be preempted, or preempt.
const NO_ROOM_COST: u64 = 2048;

/// The work until a request is answered there; the least is best.
pub fn cost(view: &View, need: &Need) -> u64 {
    let View {
        sequences,
        slots,
        cached_tokens,
        free_tokens,
        adapter,
    } = *view;
    let prompt = u64::from(need.prompt_tokens.saturating_sub(cached_tokens));
    let waiting = u64::from((sequences + 1).saturating_sub(slots.max(1)));
    let adapter = match adapter {
        Adapter::Ready => 0,
        Adapter::Absent => ADAPTER_COST,
    };
    let fits = u64::from(need.tokens.saturating_sub(cached_tokens)) <= free_tokens;
    let room = if fits { 0 } else { NO_ROOM_COST };
    prompt + u64::from(sequences) * SEQUENCE_COST + waiting * WAITING_COST + adapter + room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_weighed_against_work() {
        let idle = View {
            slots: 8,
            free_tokens: 10_000,
            ..View::default()
        };
        let with = |change: fn(&mut View)| {
            let mut view = idle;
            change(&mut view);
            view
        };
        let need = Need {
            prompt_tokens: 1000,
            tokens: 1200,
        };
        // better, worse
        let cases = [
            // Fewer sequences.
            (idle, with(|view| view.sequences = 1)),
            // A prompt that was seen outweighs a few sequences,
            (with(|view| (view.cached_tokens, view.sequences) = (960, 7)), idle),
            // but not a queue.
            (
                idle,
                with(|view| (view.cached_tokens, view.sequences) = (960, 10)),
            ),
            // A resident adapter outweighs a few sequences, not a queue.
            (
                with(|view| view.sequences = 5),
                with(|view| view.adapter = Adapter::Absent),
            ),
            (
                with(|view| view.adapter = Adapter::Absent),
                with(|view| view.sequences = 9),
            ),
            // A full cache is worse than a busy engine.
            (
                with(|view| view.sequences = 7),
                with(|view| view.free_tokens = 100),
            ),
            // Where the prompt is cached it needs no room of its own.
            (
                with(|view| (view.free_tokens, view.cached_tokens) = (300, 960)),
                with(|view| view.free_tokens = 300),
            ),
        ];
        for (better, worse) in cases {
            assert!(cost(&better, &need) < cost(&worse, &need), "{better:?} {worse:?}");
        }
    }
}
