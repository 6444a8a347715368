//! Stop strings in streamed text. Not here: stop tokens (the engine ends on those).

/// Holds back text that may be the beginning of a stop string. What comes out does not depend on how the text was cut
/// into pieces: the match that is complete first wins, of two that end together the longer.
pub struct StopStrings {
    stops: Vec<String>,
    matched: Matched,
    /// Not shown yet; shorter than the longest stop string.
    held: String,
}

/// Whether the output ends with the stop string or before it (`include_stop_str_in_output`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matched {
    Shown,
    Hidden,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Safe to show; may be empty.
    Text(String),
    /// The last text to show, and the stop string that ended it.
    Stopped { text: String, stop: String },
}

impl StopStrings {
    /// Empty strings stop nothing.
    pub fn new(stops: impl IntoIterator<Item = String>, matched: Matched) -> StopStrings {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        StopStrings {
            stops,
            matched,
            held: String::new(),
        }
    }

    /// After `Stopped`, push no more.
    pub fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        if let Some((end, start, stop)) = found.min_by_key(|&(end, start, _)| (end, start)) {
            let shown = if self.matched == Matched::Shown {
                end
            } else {
                start
            };
            let stopped = Passed::Stopped {
                text: self.held[..shown].to_owned(),
                stop: stop.clone(),
            };
            self.held.clear();
            return stopped;
        }
        let safe = self
            .stops
            .iter()
            .map(|stop| may_begin(&self.held, stop))
            .min()
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(safe);
        Passed::Text(std::mem::replace(&mut self.held, rest))
    }

    /// At the end of the generation: what was held back after all.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Where the longest end of `text` begins that is a beginning of `stop`; `text.len()` if none is. Compared as bytes: a
/// character's boundary in one is one in the other.
fn may_begin(text: &str, stop: &str) -> usize {
    let earliest = text.len().saturating_sub(stop.len() - 1);
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    (earliest..text.len())
        .find(|&start| stop.starts_with(&text[start..]))
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], matched: Matched, pieces: &[&str]) -> (String, Option<String>) {
        let mut strings = StopStrings::new(stops.iter().map(|&stop| stop.to_owned()), matched);
        let mut all = String::new();
        for piece in pieces {
            match strings.push(piece) {
                Passed::Text(text) => all.push_str(&text),
                Passed::Stopped { text, stop } => return (all + &text, Some(stop)),
            }
        }
        (all + &strings.flush(), None)
    }

    #[test]
    fn the_match_that_is_complete_first_ends_the_text() {
        let cases: [(&[&str], &str, &str, Option<&str>); 10] = [
            (&["\n\n"], "one\ntwo\n\nthree", "one\ntwo", Some("\n\n")),
            (&["END"], "EN EENDE", "EN E", Some("END")),
            (&["abcd", "bc"], "xabcd", "xa", Some("bc")),
            (&["bc", "abc"], "xabcd", "x", Some("abc")),
            (&["aab"], "aaaab", "aa", Some("aab")),
            (&["é!"], "caf\u{e8} é é!", "caf\u{e8} é ", Some("é!")),
            (&["世界"], "你好世界", "你好", Some("世界")),
            (&["stop"], "never sto", "never sto", None),
            (&[""], "empty stops nothing", "empty stops nothing", None),
            (&[], "no stop", "no stop", None),
        ];
        for (stops, text, shown, stop) in cases {
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            let halves = text.split_at(text.char_indices().nth(text.chars().count() / 2).expect("half").0);
            for pieces in [vec![text], chars, vec![halves.0, halves.1]] {
                let expected = (shown.to_owned(), stop.map(str::to_owned));
                assert_eq!(
                    run(stops, Matched::Hidden, &pieces),
                    expected,
                    "{stops:?} {pieces:?}"
                );
                let included = shown.to_owned() + stop.unwrap_or_default();
                assert_eq!(
                    run(stops, Matched::Shown, &pieces).0,
                    included,
                    "{stops:?} {pieces:?}"
                );
            }
        }
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let mut strings = StopStrings::new(["</tool>".to_owned(), "###".to_owned()], Matched::Hidden);
        for (piece, shown) in [
            ("a <", "a "),
            ("b", "<b"),
            ("</to", ""),
            ("x", "</tox"),
            ("##", ""),
            (" ", "## "),
        ] {
            assert_eq!(strings.push(piece), Passed::Text(shown.to_owned()), "{piece}");
        }
    }

    /// Over a small alphabet, so that overlaps are the rule: every cut gives what one character at a time gives.
    #[test]
    fn cuts_do_not_matter() {
        let mut state = 7_u64;
        let mut random = move |n: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for _ in 0..4000 {
            let mut word = |longest: u64| -> String {
                (0..1 + random(longest))
                    .map(|_| ['a', 'b', 'é'][random(3) as usize])
                    .collect()
            };
            let stops = [word(4), word(4), word(5)];
            let text = word(24);
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let chars: Vec<char> = text.chars().collect();
            let singles: Vec<String> = chars.iter().map(char::to_string).collect();
            let expected = run(
                &stops,
                Matched::Hidden,
                &singles.iter().map(String::as_str).collect::<Vec<_>>(),
            );
            let pieces: Vec<String> = chars
                .chunks(1 + random(5) as usize)
                .map(|chunk| chunk.iter().collect())
                .collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            assert_eq!(
                run(&stops, Matched::Hidden, &pieces),
                expected,
                "{stops:?} {pieces:?}"
            );
        }
    }
}
