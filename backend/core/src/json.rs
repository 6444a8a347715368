//! What JSON's readers disagree about: a key that an object has twice. Python takes the last, others the first or neither, so
//! what was meant is not said. Not here: what a text means.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The name of a key that an object has twice, at any depth. `None`: there is none, or the text is no JSON, which its reader
/// says.
pub fn twice(text: &[u8]) -> Option<String> {
    let error = serde_json::from_slice::<Once>(text).err()?.to_string();
    let name = error.strip_prefix(TWICE)?;
    // serde_json adds where it was.
    Some(
        name.rsplit_once(" at line ")
            .map_or(name, |(name, _)| name)
            .to_owned(),
    )
}

/// How much memory a tree of a text's values takes, roughly and rather too much, before one is made: a text of little else than
/// brackets takes a hundred times its bytes. Strings count like what is around them, because some hold JSON that is read in its turn
/// (arguments of a call, schemas).
pub fn tree_bytes(text: &[u8]) -> usize {
    let of_value = |byte: &u8| match byte {
        b'[' => 256,
        b'{' => 320,
        b':' => 80,
        b',' => 40,
        _ => 0,
    };
    text.len() + text.iter().map(of_value).sum::<usize>()
}

const TWICE: &str = "twice: ";

/// Any value in whose objects each key stands once.
struct Once;

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Once, D::Error> {
        deserializer.deserialize_any(Once)
    }
}

macro_rules! plain {
    ($($visit:ident($value:ty))*) => {
        $(fn $visit<E>(self, _: $value) -> Result<Once, E> {
            Ok(Once)
        })*
    };
}

impl<'de> Visitor<'de> for Once {
    type Value = Once;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("any value")
    }

    plain! { visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str) }

    fn visit_unit<E>(self) -> Result<Once, E> {
        Ok(Once)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Once, A::Error> {
        while list.next_element::<Once>()?.is_some() {}
        Ok(Once)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once, A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if names.contains(&name) {
                return Err(A::Error::custom(format_args!("{TWICE}{name}")));
            }
            map.next_value::<Once>()?;
            names.insert(name);
        }
        Ok(Once)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_a_string_counts() {
        assert_eq!(tree_bytes(b"[1,[2]]"), 7 + 2 * 256 + 40);
        let nested = br#"{"arguments":"{\"a\":[1,2]}"}"#;
        assert_eq!(tree_bytes(nested), 29 + 2 * 320 + 2 * 80 + 256 + 40);
    }

    #[test]
    fn a_key_may_stand_once_in_each_object() {
        for (text, expected) in [
            (r#"{"a": 1, "b": [{"a": 1}, {"a": 2}]}"#, None),
            (r#"{"a": 1, "b": 2, "a": 3}"#, Some("a")),
            (r#"{"b": [1, {"x y": null, "x y": null}]}"#, Some("x y")),
            (r#"{"\u0061": 1, "a": 1}"#, Some("a")),
            (r#"{"a": 1, "#, None),
            ("[1.5, -2, true, null]", None),
        ] {
            assert_eq!(twice(text.as_bytes()).as_deref(), expected, "{text}");
        }
    }
}
