//! How many tokens of an answer are reasoning.

use super::*;

/// Reasoning's format, whether the prompt opened it, an answer's tokens, and how many of them are reasoning.
#[rustfmt::skip] // one case, one line
const CASES: &[(&str, bool, &str, u32)] = &[
    ("qwen3", false, "yes|.", 0),
    ("qwen3", false, "<think>|so| it| is|</think>|yes", 3),
    ("qwen3", true, "so| it| is|</think>|yes| yes", 3),
    ("qwen3", true, "so| it| is", 3),
    // A mark of several tokens; of one with a part of it and a part of reasoning.
    ("qwen3", true, "so| it|</|thi|nk>|yes", 2),
    ("qwen3", true, "so| it </|thi|nk>yes|.", 2),
    ("qwen3", true, "so| <thin|g>| it|</think>|yes", 4),
    ("qwen3", false, "<thi|nk>so|</think>yes", 1),
    ("qwen3", false, "<think>|</think>|yes", 0),
    ("qwen3", false, "<think></think>yes|.", 0),
    // Parts of a character, and what is not shown.
    ("qwen3", true, "||é|</think>||é", 3),
    ("qwen3", true, "so||</think>|yes|", 1),
    ("qwen3", true, "so|", 2),
    // A call ends it; what looks like one does not.
    ("qwen3", true, "so| <tool|_call>|{\"name\": \"now\", |\"arguments\": {}}|</tool_call>", 2),
    ("qwen3", true, "so| <tool|_call>|no|</think>|yes", 4),
    ("mistral", false, "[THINK]|so|[/THINK]|yes", 1),
    ("openai_gptoss", false, "<|channel|>|analysis|<|message|>|We| think|<|end|>|<|start|>|assistant|<|channel|>|analysis\
        |<|message|>|more|<|end|>|<|start|>|assistant|<|channel|>|final|<|message|>|yes", 3),
    ("openai_gptoss", false, "<|channel|>|analysis|<|message|>|We| think", 2),
];

#[test]
fn tokens_between_the_marks_of_reasoning_are_counted() {
    for &(name, is_opened, tokens, expected) in CASES {
        let reading = Reading {
            tools: ToolFormat::named("hermes"),
            reasoning: ReasoningFormat::named(name),
            is_opened,
        };
        assert!(reading.reasoning.is_some(), "{name}");
        let marked = tokens.replace("<|", "<\u{1}").replace("|>", "\u{1}>");
        let tokens: Vec<String> = marked
            .split('|')
            .map(|token| token.replace('\u{1}', "|"))
            .collect();
        // Text comes with its token or so many tokens later; all at once at last.
        for late in 0..=tokens.len() {
            let mut reader = Reader::new(reading, super::tools());
            let mut last = 0;
            let texts = tokens.iter().map(Some).chain(std::iter::repeat_n(None, late));
            for (i, token) in texts.enumerate() {
                if let Some(token) = token {
                    reader.token(token.chars().count());
                }
                if let Some(text) = i.checked_sub(late).map(|i| &tokens[i]) {
                    reader.push(text);
                }
                assert!(reader.reasoning_tokens() >= last);
                last = reader.reasoning_tokens();
            }
            reader.finish();
            assert_eq!(reader.reasoning_tokens(), expected, "{name} {late} {tokens:?}");
        }
    }
}
