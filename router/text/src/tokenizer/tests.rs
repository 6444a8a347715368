//! Ids and texts against transformers and the tokenizers library, folders, odd input.

use super::*;
use crate::fixture;
use serde_json::json;

fn library(json: &str) -> tokenizers::Tokenizer {
    json.parse().expect("a tokenizer")
}

#[test]
fn demo_ids_and_texts_are_transformers() {
    let tokenizer = fixture::demo();
    for case in fixture::demo_cases() {
        let ids = |name: &str| serde_json::from_value::<Vec<u32>>(case[name].clone()).unwrap();
        let text = |name: &str| case[name].as_str().unwrap().to_owned();
        let prompt = text("prompt");
        let prompt_ids = tokenizer.encode(&prompt, SpecialTokens::Add).unwrap();
        assert_eq!(prompt_ids, ids("prompt_ids"), "{prompt}");
        let greedy = ids("greedy_ids");
        let shown = |ids: &[u32]| tokenizer.decode(ids, Skip::Special).unwrap();
        assert_eq!(shown(&greedy), text("greedy_text"));
        assert_eq!(shown(&[prompt_ids, greedy].concat()), text("full_text"));
    }
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos()),
        (Some((0, "<|bos|>")), Some((1, "<|end|>")))
    );
    assert_eq!(
        (
            tokenizer.vocab_size(),
            tokenizer.is_special(5),
            tokenizer.is_special(6)
        ),
        (1024, true, false)
    );
    assert!(tokenizer.chat_template().is_ok());
}

/// Valid text decodes as the library decodes it. (On invalid UTF-8 the library's byte fallback also destroys the
/// valid characters beside it; here only the broken bytes become U+FFFD.)
#[test]
fn decodes_as_the_library_does() {
    let trained = fixture::byte_level_json();
    let cases = [
        (fixture::byte_level(""), library(&trained)),
        (fixture::pieces(""), library(&fixture::pieces_json().to_string())),
    ];
    for (tokenizer, library) in &cases {
        for text in fixture::CORPUS
            .into_iter()
            .chain(["", " ", "<s>a</s><|im_end|>", "the the\n in 🎉"])
        {
            let ids = tokenizer.encode(text, SpecialTokens::Omit).unwrap();
            for (skip, skips) in [(Skip::Nothing, false), (Skip::Special, true)] {
                let expected = library.decode(&ids, skips).unwrap();
                assert_eq!(tokenizer.decode(&ids, skip).unwrap(), expected, "{text:?}");
            }
        }
    }
    // Random ids: under the byte-level alphabet both are lossy in the same way.
    let (tokenizer, library) = &cases[0];
    let mut random = fixture::Random(3);
    for _ in 0..300 {
        let ids: Vec<u32> = (0..random.below(30)).map(|_| random.below(420) as u32).collect();
        assert_eq!(
            tokenizer.decode(&ids, Skip::Nothing).unwrap(),
            library.decode(&ids, false).unwrap()
        );
    }
}

#[test]
fn tokens_have_bytes() {
    let (pieces, trained) = (fixture::pieces(""), fixture::byte_level(""));
    let id = |tokenizer: &Tokenizer, text: &str| tokenizer.encode(text, SpecialTokens::Omit).unwrap();
    assert_eq!(pieces.token_bytes(3 + 0xC3), [0xC3]);
    assert_eq!(pieces.token_text(3 + 0xC3), "\u{FFFD}");
    assert_eq!(
        id(&pieces, "the")
            .iter()
            .map(|&id| pieces.token_text(id))
            .collect::<Vec<_>>(),
        [" the"]
    );
    let emoji = id(&trained, "🦀");
    assert_eq!(
        emoji
            .iter()
            .flat_map(|&id| trained.token_bytes(id))
            .collect::<Vec<_>>(),
        "🦀".as_bytes()
    );
    let eos = trained.eos().unwrap().0;
    assert_eq!(
        (trained.token_text(eos), trained.is_special(eos)),
        ("</s>".to_owned(), true)
    );
    let added = id(&trained, "<té>");
    assert_eq!(
        (
            trained.token_text(added[0]).as_str(),
            trained.is_special(added[0])
        ),
        ("<té>", false)
    );
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    let tokenizer = fixture::pieces("");
    let vocab_size = tokenizer.vocab_size();
    for id in [vocab_size as u32, u32::MAX] {
        assert_eq!(
            tokenizer.decode(&[0, id], Skip::Special),
            Err(TextError::UnknownToken { id, vocab_size })
        );
        assert_eq!(
            (tokenizer.token_bytes(id), tokenizer.is_special(id)),
            (vec![], false)
        );
    }
}

#[test]
fn what_a_folder_says_about_special_tokens() {
    // No post-processor: the config decides about BOS. The saved truncation to 4 tokens is not applied.
    let pieces = fixture::pieces("");
    let ids = pieces.encode("the in the in the", SpecialTokens::Add).unwrap();
    assert_eq!((ids[0], ids.len()), (1, 8));
    assert!(!pieces.encode("the", SpecialTokens::Omit).unwrap().contains(&1));
    // A post-processor that adds nothing wins over the config.
    let config = json!({"bos_token": "<s>", "add_bos_token": true}).to_string();
    let files = [
        ("tokenizer.json", fixture::byte_level_json()),
        ("tokenizer_config.json", config),
    ];
    let trained = fixture::load(&files).unwrap();
    assert_ne!(
        trained.encode("a", SpecialTokens::Add).unwrap()[0],
        trained.bos().unwrap().0
    );
    // special_tokens_map.json fills what the config leaves out.
    let map = json!({"eos_token": {"content": "</s>"}}).to_string();
    let with_map = [&files[..], &[("special_tokens_map.json", map)]].concat();
    assert_eq!(
        fixture::load(&with_map).unwrap().eos().map(|(_, text)| text),
        Some("</s>")
    );
    assert_eq!(trained.eos(), None);
}

#[test]
fn where_a_chat_template_comes_from() {
    let named = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
    let cases = [
        (json!({"chat_template": "S"}), None, Ok("S")),
        (json!({"chat_template": named}), None, Ok("D")),
        (json!({"chat_template": "S"}), Some("J"), Ok("J")),
        (json!({}), None, Err(TextError::NoChatTemplate)),
        (
            json!({"chat_template": null}),
            None,
            Err(TextError::NoChatTemplate),
        ),
    ];
    for (config, jinja, expected) in cases {
        let mut files = vec![
            ("tokenizer.json", fixture::byte_level_json()),
            ("tokenizer_config.json", config.to_string()),
        ];
        files.extend(jinja.map(|source| ("chat_template.jinja", source.to_owned())));
        let tokenizer = fixture::load(&files).unwrap();
        let rendered = tokenizer
            .chat_template()
            .and_then(|template| template.render(&[], Ending::Closed, &Kwargs::new()));
        assert_eq!(rendered, expected.clone().map(str::to_owned), "{config}");
        assert_eq!(tokenizer.chat_template_source(), expected.ok());
    }
}

#[test]
fn bad_folders_are_named() {
    let cases: [(&[(&str, String)], &str); 3] = [
        (
            &[("tokenizer.model", String::new())],
            "save the model once with transformers",
        ),
        (
            &[("tokenizer.json", "{}".to_owned())],
            "tokenizer.json is damaged",
        ),
        (
            &[
                ("tokenizer.json", fixture::byte_level_json()),
                ("tokenizer_config.json", "[".to_owned()),
            ],
            "tokenizer_config.json is damaged",
        ),
    ];
    for (files, expected) in cases {
        let error = fixture::load(files).err().expect("must not load").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn any_text_encodes() {
    let long = "a".repeat(100_000);
    let texts = [
        "",
        "\0",
        "\u{FFFD}\u{202E}",
        "<|im_start|",
        "e\u{301}\u{301}\u{301}",
        " \n\t\r ",
        long.as_str(),
    ];
    for tokenizer in [fixture::pieces(""), fixture::byte_level(""), fixture::demo()] {
        for text in texts {
            tokenizer.encode(text, SpecialTokens::Add).unwrap();
        }
    }
}

#[test]
fn a_continuation_has_no_dummy_prefix() {
    for tokenizer in [fixture::pieces(""), fixture::byte_level("")] {
        for (before, after) in [
            ("the", " the in"),
            ("in\n", "the"),
            ("a", "b"),
            ("", "x"),
            ("x", ""),
        ] {
            let start = tokenizer.encode(before, SpecialTokens::Omit).unwrap();
            let rest = tokenizer
                .encode_continuation(after)
                .unwrap()
                .expect("nothing merges here");
            let text = tokenizer.decode(&[start, rest].concat(), Skip::Nothing).unwrap();
            assert_eq!(text, format!("{before}{after}"));
        }
    }
}
