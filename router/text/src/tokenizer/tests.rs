//! Ids and texts against transformers and the tokenizers library, folders, odd input.

use super::*;
use crate::fixture;
use serde_json::{Value as Json, json};

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
    assert!(tokenizer.chat_template(&Kwargs::new()).is_ok());
}

/// What is broken decodes as in the library, too. (But the library's byte fallback also destroys the valid characters
/// that stand in one run of byte tokens with broken ones; here those stay.)
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
fn broken_bytes_decode_as_the_library_does() {
    let (tokenizer, library) = (fixture::pieces(""), library(&fixture::pieces_json().to_string()));
    let word = tokenizer.encode("the", SpecialTokens::Omit).unwrap();
    let runs: [&[u8]; 9] = [
        "é🦀".as_bytes(),
        b"\xF0\x9F",
        b"\xE4",
        b"\xE4\xB8",
        b"\xC3\xC3",
        b"\x80\xBF\xFF",
        b"\xF0\x9F\xA6\xF0\x9F",
        b"a",
        b"",
    ];
    let mut random = fixture::Random(5);
    for _ in 0..200 {
        let mut ids = Vec::new();
        for _ in 0..random.below(6) {
            ids.extend(
                runs[random.below(runs.len())]
                    .iter()
                    .map(|&byte| 3 + u32::from(byte)),
            );
            ids.extend(&word);
        }
        ids.extend(
            runs[random.below(runs.len())]
                .iter()
                .map(|&byte| 3 + u32::from(byte)),
        );
        let expected = library.decode(&ids, false).unwrap();
        assert_eq!(
            tokenizer.decode(&ids, Skip::Nothing).unwrap(),
            expected,
            "{ids:?}"
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

/// As transformers 5.24 reads the same folders.
#[test]
fn what_a_folder_says_about_added_tokens() {
    let token = |text: &str| json!({"content": text, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let next = fixture::byte_level("").vocab_size() as u32;
    let only_here = json!({"added_tokens_decoder": {next.to_string(): token("<|tool|>"), (next + 1).to_string(): token("<|end|>")}});
    let listed = json!({"<|tool|>": next}).to_string();
    let map = json!({"eos_token": "</s>", "additional_special_tokens": ["<|tool|>"]}).to_string();
    type Case<'a> = (Json, &'a [(&'a str, String)], Option<&'a str>);
    let cases: [Case; 7] = [
        (json!({}), &[], None),
        (only_here.clone(), &[], Some("<|tool|>")),
        (
            json!({}),
            &[("added_tokens.json", listed.clone())],
            Some("<|tool|>"),
        ),
        (json!({"pad_token": "<|tool|>"}), &[], Some("<|tool|>")),
        (
            json!({"extra_special_tokens": {"tool_token": token("<|tool|>")}}),
            &[],
            Some("<|tool|>"),
        ),
        (
            json!({}),
            &[("special_tokens_map.json", map.clone())],
            Some("<|tool|>"),
        ),
        // The config's own list takes the place of the older files.
        (
            json!({"added_tokens_decoder": {}}),
            &[
                ("special_tokens_map.json", map.clone()),
                ("added_tokens.json", listed),
            ],
            None,
        ),
    ];
    for (config, files, whole) in cases {
        let first = [
            ("tokenizer.json", fixture::byte_level_json()),
            ("tokenizer_config.json", config.to_string()),
        ];
        let tokenizer = fixture::load(&[&first[..], files].concat()).unwrap();
        let ids = tokenizer.encode("<|tool|>", SpecialTokens::Omit).unwrap();
        assert_eq!(ids == [next], whole.is_some(), "{config}");
        assert_eq!(tokenizer.decode(&ids, Skip::Nothing).unwrap(), "<|tool|>");
        let special = config
            .get("added_tokens_decoder")
            .is_some_and(|list| list.get(next.to_string()).is_some());
        assert!(!special || tokenizer.is_special(next), "{config}");
    }
    // The map wins over the config, unless the config lists added tokens.
    for (config, eos) in [
        (json!({"eos_token": "<s>"}), Some("</s>")),
        (json!({}), Some("</s>")),
        (
            json!({"eos_token": "<s>", "added_tokens_decoder": {}}),
            Some("<s>"),
        ),
        (json!({"added_tokens_decoder": {}}), None),
    ] {
        let files = [
            ("tokenizer.json", fixture::byte_level_json()),
            ("tokenizer_config.json", config.to_string()),
            ("special_tokens_map.json", map.clone()),
        ];
        let tokenizer = fixture::load(&files).unwrap();
        assert_eq!(tokenizer.eos().map(|(_, text)| text), eos, "{config}");
    }
    // An id that the library cannot give would be another row of the embedding than the one that was trained.
    let far = json!({"added_tokens_decoder": {(next + 7).to_string(): token("<|tool|>")}});
    let files = [
        ("tokenizer.json", fixture::byte_level_json()),
        ("tokenizer_config.json", far.to_string()),
    ];
    let refused = fixture::load(&files).err().expect("must not load").to_string();
    assert!(
        refused.contains(&format!(
            "the id {}, but with tokenizer.json it is {next}",
            next + 7
        )),
        "{refused}"
    );
}

#[test]
fn what_a_folder_says_about_the_ends_of_a_text() {
    // The saved truncation to 4 tokens is not applied.
    let pieces = fixture::pieces("");
    let ids = pieces.encode("the in the in the", SpecialTokens::Add).unwrap();
    assert_eq!((ids[0], ids.len()), (1, 8));
    assert!(!pieces.encode("the", SpecialTokens::Omit).unwrap().contains(&1));
    // tokenizer.json adds nothing here; what the config says explicitly wins, a flag without its token does nothing.
    let cases = [
        (json!({"bos_token": "<s>", "eos_token": "</s>"}), [false, false]),
        (json!({"bos_token": "<s>", "add_bos_token": true}), [true, false]),
        (
            json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false, "add_eos_token": true}),
            [false, true],
        ),
        (
            json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true}),
            [true, true],
        ),
        (json!({"add_bos_token": true}), [false, false]),
    ];
    for (config, expected) in cases {
        let files = [
            ("tokenizer.json", fixture::byte_level_json()),
            ("tokenizer_config.json", config.to_string()),
        ];
        let tokenizer = fixture::load(&files).unwrap();
        let (plain, added) = [SpecialTokens::Omit, SpecialTokens::Add]
            .map(|special| tokenizer.encode("a b", special).unwrap())
            .into();
        let is_at =
            |place: Option<&u32>, token: Option<(u32, &str)>| token.is_some_and(|(id, _)| place == Some(&id));
        let ends = [
            is_at(added.first(), tokenizer.bos()),
            is_at(added.last(), tokenizer.eos()),
        ];
        assert_eq!(ends, expected, "{config}");
        assert_eq!(
            added.len(),
            plain.len() + expected.iter().filter(|end| **end).count(),
            "{config}"
        );
    }
    // And it takes away what tokenizer.json would add.
    let mut json: Json = serde_json::from_str(&fixture::byte_level_json()).unwrap();
    let bos = fixture::byte_level("").bos().expect("named in its config").0;
    json["post_processor"] = json!({
        "type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    });
    for (config, n_added) in [(json!({}), 1), (json!({"add_bos_token": false}), 0)] {
        let files = [
            ("tokenizer.json", json.to_string()),
            ("tokenizer_config.json", config.to_string()),
        ];
        let tokenizer = fixture::load(&files).unwrap();
        let n = |special| tokenizer.encode("a", special).unwrap().len();
        assert_eq!(
            n(SpecialTokens::Add) - n(SpecialTokens::Omit),
            n_added,
            "{config}"
        );
    }
    let config = json!({"split_special_tokens": true}).to_string();
    let split = fixture::load(&[
        ("tokenizer.json", fixture::byte_level_json()),
        ("tokenizer_config.json", config),
    ]);
    assert!(split.unwrap().encode("</s>", SpecialTokens::Omit).unwrap().len() > 1);
}

#[test]
fn where_a_chat_template_comes_from() {
    let tool_use = "additional_chat_templates/tool_use.jinja";
    let rag = "additional_chat_templates/rag.jinja";
    let named =
        json!([{"name": "tool_use", "template": "T{{ tools }}"}, {"name": "default", "template": "D"}]);
    let no_default =
        json!([{"name": "tool_use", "template": "T{{ tools }}"}, {"name": "rag", "template": "R"}]);
    let none = || Err(TextError::NoChatTemplate);
    let unnamed = |names: &str| Err(TextError::NoDefaultTemplate(names.to_owned()));
    let config = |template: Json| json!({"chat_template": template});
    // What renders without tools, and with.
    type Rendered = Result<&'static str, TextError>;
    type Case<'a> = (Json, &'a [(&'a str, &'a str)], Rendered, Rendered);
    let cases: [Case; 10] = [
        (config(json!("S{{ tools }}")), &[], Ok("SNone"), Ok("S[1]")),
        (config(named.clone()), &[], Ok("D"), Ok("T[1]")),
        (
            config(json!({"default": "D{{ tools }}"})),
            &[],
            Ok("DNone"),
            Ok("D[1]"),
        ),
        (config(no_default), &[], unnamed("rag, tool_use"), Ok("T[1]")),
        (
            config(named),
            &[("chat_template.jinja", "J{{ tools }}\r\n")],
            Ok("JNone"),
            Ok("J[1]"),
        ),
        (
            json!({}),
            &[("chat_template.jinja", "J"), (tool_use, "A{{ tools }}")],
            Ok("J"),
            Ok("A[1]"),
        ),
        (config(json!("S")), &[(rag, "R")], unnamed("rag"), unnamed("rag")),
        (
            json!({}),
            &[("chat_template.json", r#"{"chat_template": "P{{ tools }}"}"#)],
            Ok("PNone"),
            Ok("P[1]"),
        ),
        (json!({}), &[], none(), none()),
        (config(json!(null)), &[], none(), none()),
    ];
    for (config, more, without, with) in cases {
        let mut files = vec![
            ("tokenizer.json", fixture::byte_level_json()),
            ("tokenizer_config.json", config.to_string()),
        ];
        files.extend(more.iter().map(|(name, text)| (*name, (*text).to_owned())));
        let tokenizer = fixture::load(&files).unwrap();
        for (kwargs, expected) in [
            (Kwargs::new(), without),
            (Kwargs::from([("tools".to_owned(), json!([1]))]), with),
        ] {
            let rendered = tokenizer
                .chat_template(&kwargs)
                .and_then(|template| template.render(&[], Ending::Closed, &kwargs));
            assert_eq!(rendered, expected.map(str::to_owned), "{config} {more:?}");
        }
    }
}

#[test]
fn bad_folders_are_named() {
    let cases: [(&[(&str, String)], &str); 4] = [
        (
            &[(
                "tokenizer.json",
                "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n".to_owned(),
            )],
            "git lfs pull",
        ),
        (
            &[("tokenizer.model", String::new())],
            "transformers converts it, with sentencepiece",
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
