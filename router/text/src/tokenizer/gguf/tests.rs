//! Tokenizers of GGUF files against the folder that one was made from and against sentencepiece, and wrong files.
//! tests/numerics/make_gguf.py makes the files.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tandem_core::gguf;

use super::super::pretokenizers;
use crate::chat::{Ending, Kwargs};
use crate::{Skip, SpecialTokens, Tokenizer};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/numerics/fixtures")
        .join(name)
}

const TEXTS: [&str; 8] = [
    "",
    "Hello world, don't I'll",
    " two  spaces   and\ttabs\n\nlines ",
    "Ünïcödé, ελληνικά, 漢字, 🦙🦙 e\u{301}",
    "1234567890 3.14159",
    "<s>a</s> </s>b",
    "\0\u{2581} \u{A0}\u{3000}",
    "the the the in the other",
];

#[test]
fn byte_level_bpe_is_the_folders() {
    let (folder, gguf) = (fixture("gqa_tied"), fixture("gguf/gqa_tied.gguf"));
    let (folder, gguf) = (Tokenizer::open(&folder).unwrap(), Tokenizer::open(&gguf).unwrap());
    for text in TEXTS {
        for special in [SpecialTokens::Add, SpecialTokens::Omit] {
            let ids = gguf.encode(text, special).unwrap();
            assert_eq!(ids, folder.encode(text, special).unwrap(), "{text:?}");
            assert_eq!(
                gguf.decode(&ids, Skip::Special),
                folder.decode(&ids, Skip::Special)
            );
        }
    }
    assert_eq!((gguf.bos(), gguf.eos()), (folder.bos(), folder.eos()));
    let render = |tokenizer: &Tokenizer| {
        let template = tokenizer.chat_template(&Kwargs::new()).unwrap();
        template
            .render(&[], Ending::GenerationPrompt, &Kwargs::new())
            .unwrap()
    };
    assert_eq!(render(&gguf), render(&folder));
}

#[test]
fn sentencepiece_is_sentencepieces() {
    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }
    let tokenizer = Tokenizer::open(&fixture("gguf/spm.gguf")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(fixture("gguf/spm.json")).unwrap()).unwrap();
    assert!(cases.len() > 40);
    for Case { text, ids } in cases {
        assert_eq!(
            tokenizer.encode(&text, SpecialTokens::Omit).unwrap(),
            ids,
            "{text:?}"
        );
        // A space is written so, and both become one.
        if !text.contains('\u{2581}') {
            assert_eq!(tokenizer.decode(&ids, Skip::Special).unwrap(), text);
        }
        let (bos, _) = tokenizer.bos().unwrap();
        let with_bos = [&[bos], &ids[..]].concat();
        assert_eq!(
            tokenizer.encode(&text, SpecialTokens::Add).unwrap(),
            with_bos,
            "{text:?}"
        );
    }
    // What follows a token that is cut out begins with the prefix, as in llama.cpp and Llama 2's published tokenizer.json;
    // sentencepiece itself has none there.
    let ids = |text: &str| tokenizer.encode(text, SpecialTokens::Omit).unwrap();
    assert_eq!(ids("a<mark>b"), [ids("a"), vec![3], ids("b")].concat());
}

/// Written and read again, tokenizers of both kinds are what they were; the model may have rows without a token.
#[test]
fn a_folders_tokenizer_is_written() {
    let spm = tempfile::tempdir().unwrap();
    for (name, content) in super::files(&fixture("gguf/spm.gguf")).unwrap() {
        std::fs::write(spm.path().join(name), content).unwrap();
    }
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../server/demo");
    for folder in [fixture("gqa_tied"), demo, spm.path().to_owned()] {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let rows = tokenizer.vocab_size() + 3;
        let values = super::metadata(&folder, rows).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
        let file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
        std::fs::write(file.path(), gguf::head(&values, &[])).unwrap();
        let written = Tokenizer::open(file.path()).unwrap();
        for text in TEXTS {
            for special in [SpecialTokens::Add, SpecialTokens::Omit] {
                let ids = tokenizer.encode(text, special).unwrap();
                assert_eq!(written.encode(text, special).unwrap(), ids, "{folder:?} {text:?}");
                assert_eq!(
                    written.decode(&ids, Skip::Special),
                    tokenizer.decode(&ids, Skip::Special)
                );
            }
        }
        assert_eq!((written.bos(), written.eos()), (tokenizer.bos(), tokenizer.eos()));
        assert_eq!(written.special_tokens(), tokenizer.special_tokens());
        assert_eq!(written.chat_template_source(), tokenizer.chat_template_source());
        let error = super::metadata(&folder, rows - 4).unwrap_err().to_string();
        assert!(error.contains("rows for tokens"), "{error}");
    }
}

#[test]
fn every_pretokenizer_compiles_and_keeps_the_text() {
    let good = std::fs::read(fixture("gguf/gqa_tied.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    let mut tried = 0;
    for name in pretokenizers::names().split(", ") {
        std::fs::write(&file, with_pre(&good, name)).unwrap();
        let tokenizer = Tokenizer::open(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
        for text in TEXTS {
            let ids = tokenizer.encode(text, SpecialTokens::Omit).unwrap();
            // Composed already, where a text can be.
            if !text.contains('\u{301}') {
                assert_eq!(tokenizer.decode(&ids, Skip::Nothing).unwrap(), text, "{name}");
            }
        }
        tried += 1;
    }
    assert!(tried > 30);
}

const PRE: &[u8] = b"tokenizer.ggml.pre";

fn find(bytes: &[u8], what: &[u8]) -> usize {
    let at = bytes.windows(what.len()).position(|window| window == what);
    at.unwrap_or_else(|| panic!("{} is there", String::from_utf8_lossy(what)))
}

/// The file's head with another text as the value of `tokenizer.ggml.pre`; its tensors are not looked at.
fn with_pre(bytes: &[u8], name: &str) -> Vec<u8> {
    let length = find(bytes, PRE) + PRE.len() + 4;
    let old = u64::from_le_bytes(bytes[length..length + 8].try_into().unwrap()) as usize;
    let (head, rest) = (&bytes[..length], &bytes[length + 8 + old..]);
    [head, &(name.len() as u64).to_le_bytes(), name.as_bytes(), rest].concat()
}

#[test]
fn wrong_files_are_named() {
    let good = std::fs::read(fixture("gguf/gqa_tied.gguf")).unwrap();
    let spm = std::fs::read(fixture("gguf/spm.gguf")).unwrap();
    let replaced = |bytes: &[u8], from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = find(bytes, from.as_bytes());
        [&bytes[..at], to.as_bytes(), &bytes[at + to.len()..]].concat()
    };
    let id = |key: &str, id: u32| {
        let at = find(&good, key.as_bytes()) + key.len() + 4;
        [&good[..at], &id.to_le_bytes(), &good[at + 4..]].concat()
    };
    let cases: [(Vec<u8>, &str); 10] = [
        (
            with_pre(&good, "qwen9"),
            "unsupported tokenizer: m.gguf: `tokenizer.ggml.pre`: llama-bpe, ",
        ),
        (with_pre(&good, "qwen9"), "are supported (it is \"qwen9\")"),
        (
            replaced(&good, "tokenizer.ggml.pre", "tokenizer.ggml.prE"),
            "the key `tokenizer.ggml.pre` is missing: how text is cut",
        ),
        (
            replaced(&good, "gpt2", "bert"),
            "`tokenizer.ggml.model`: gpt2 (byte-level BPE) and llama (SentencePiece) are supported (it is \"bert\")",
        ),
        (
            replaced(&good, "tokenizer.ggml.model", "tokenizer.ggml.modeL"),
            "the key `tokenizer.ggml.model` is missing: the tokenizer is read from the file",
        ),
        (
            replaced(&good, "tokenizer.ggml.tokens", "tokenizer.ggml.tokenS"),
            "the key `tokenizer.ggml.tokens` is missing",
        ),
        (
            replaced(&good, "tokenizer.ggml.merges", "tokenizer.ggml.mergeS"),
            "the key `tokenizer.ggml.merges` is missing",
        ),
        (
            replaced(&spm, "tokenizer.ggml.scores", "tokenizer.ggml.scoreS"),
            "the key `tokenizer.ggml.scores` is missing",
        ),
        (
            id("tokenizer.ggml.eos_token_id", 288),
            "`tokenizer.ggml.eos_token_id`: the vocabulary has 288 tokens (it is 288)",
        ),
        (good[..400].to_vec(), "m.gguf is damaged"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    for (bytes, expected) in cases {
        std::fs::write(&file, &bytes).unwrap();
        let error = Tokenizer::open(&file).err().expect(expected).to_string();
        assert!(error.contains(expected), "{error}\n{expected}");
    }
}
