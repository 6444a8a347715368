//! What a misspelt name was probably meant to be: one measure for options, fields, settings and keys.

/// The one of `known` that `name` was meant to be, if it differs in nothing but case, dashes and a letter or two. Short
/// names are close to each other, so that less may differ: below four letters nothing, below six no letter may be another.
pub fn closest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let given = plain(name);
    let distances = known.into_iter().filter_map(|candidate| {
        let meant = plain(candidate);
        let distance = strsim::osa_distance(&given, &meant);
        let is_close = match meant.len().max(given.len()) {
            0..=3 => distance == 0,
            4..=5 => distance <= 1 && strsim::levenshtein(&given, &meant) != 1 || adds_one(&given, &meant),
            6..=7 => distance <= 1,
            _ => distance <= 2,
        };
        is_close.then_some((distance, candidate))
    });
    let (_, meant) = distances.min_by_key(|(distance, _)| *distance)?;
    Some(meant.to_owned())
}

fn plain(text: &str) -> String {
    let letters = text.chars().filter(|c| *c != '_' && *c != '-');
    letters.flat_map(char::to_lowercase).collect()
}

/// One has a letter that the other lacks, and they are alike otherwise.
fn adds_one(one: &str, other: &str) -> bool {
    one.chars().count().abs_diff(other.chars().count()) == 1 && strsim::levenshtein(one, other) == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_probably_meant() {
        let known = [
            "max_tokens",
            "stop",
            "top_k",
            "top_p",
            "n",
            "seed",
            "messages",
            "limit",
            "user_name",
        ];
        for (name, expected) in [
            ("max_token", Some("max_tokens")),
            ("maxTokens", Some("max_tokens")),
            ("mesages", Some("messages")),
            ("stops", Some("stop")),
            ("Top-P", Some("top_p")),
            ("N", Some("n")),
            ("limti", Some("limit")),
            ("limits", Some("limit")),
            ("sed", Some("seed")),
            ("m", None),
            ("seek", None),
            ("shop", None),
            ("store", None),
            ("max_new_tokens", None),
            ("user", None),
        ] {
            assert_eq!(closest(name, known).as_deref(), expected, "{name}");
        }
    }
}
