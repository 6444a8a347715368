//! Templates against Jinja2's own output, open messages, refusals.

use super::*;
use serde_json::json;

const LLAMA2: &str = include_str!("../fixture/llama2.jinja");
const LLAMA3: &str = include_str!("../fixture/llama3.jinja");
const CHATML: &str = include_str!("../fixture/chatml.jinja");
const ZEPHYR: &str = include_str!("../fixture/zephyr.jinja");
const THINKING: &str = include_str!("../fixture/thinking.jinja");

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, [("bos_token", "<s>"), ("eos_token", "</s>")]).unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    let message = |&(role, content): &(&str, &str)| Message {
        role: role.to_owned(),
        content: content.to_owned(),
        ..Message::default()
    };
    turns.iter().map(message).collect()
}

fn kwargs(json: serde_json::Value) -> Kwargs {
    serde_json::from_value(json).unwrap()
}

/// Expected: what Jinja2 3.1.6 in transformers' sandbox environment (trim_blocks, lstrip_blocks, its tojson and its
/// generation tag) renders from the same files.
#[test]
fn renders_what_jinja2_renders() {
    let short = chat(&[("user", "Hi ")]);
    let long = chat(&[
        ("system", "Be brief.\n"),
        ("user", "2+2?"),
        ("assistant", " 4 "),
        ("user", "<b> & 'é'\n"),
    ]);
    let think = chat(&[
        ("user", "a"),
        ("assistant", "<think>hm</think>\nb"),
        ("user", "c"),
        ("assistant", "<think>x</think>\nd"),
    ]);
    let mut named = chat(&[("user", "Hi")]);
    named[0].name = Some("Ann".to_owned());
    let tool =
        json!({"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"x": []}}});
    let (prompt, closed) = (Ending::GenerationPrompt, Ending::Closed);
    let cases = [
        (LLAMA2, &short, prompt, json!({}), "<s>[INST] Hi [/INST]"),
        (
            LLAMA2,
            &long,
            prompt,
            json!({}),
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2+2? [/INST] 4 </s><s>[INST] <b> & 'é' [/INST]",
        ),
        (
            LLAMA3,
            &short,
            prompt,
            json!({}),
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            LLAMA3,
            &long,
            closed,
            json!({}),
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\n<b> & 'é'<|eot_id|>",
        ),
        (
            LLAMA3,
            &long,
            prompt,
            json!({"date_string": "1 May", "tools": [tool]}),
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 1 May\n\nFunctions:\n\n\
             {\n    \"type\": \"function\",\n    \"function\": {\n        \"name\": \"f\",\n        \
             \"description\": \"<é>\",\n        \"parameters\": {\n            \"x\": []\n        }\n    }\n}\n\n\
             Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\n<b> & 'é'<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            CHATML,
            &short,
            prompt,
            json!({}),
            "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n\
             <|im_start|>assistant\n",
        ),
        (
            CHATML,
            &long,
            closed,
            json!({}),
            "<|im_start|>system\nBe brief.\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n\
             <|im_start|>assistant\n 4 <|im_end|>\n<|im_start|>user\n<b> & 'é'\n<|im_end|>\n",
        ),
        (
            CHATML,
            &named,
            prompt,
            json!({"enable_thinking": false}),
            "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user name=Ann\nHi<|im_end|>\n\
             <|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            ZEPHYR,
            &long,
            prompt,
            json!({}),
            "<|system|>\nBe brief.\n</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n 4 </s>\n\
             <|user|>\n<b> & 'é'\n</s>\n<|assistant|>\n",
        ),
        (ZEPHYR, &short, closed, json!({}), "<|user|>\nHi </s>\n"),
        (
            THINKING,
            &think,
            prompt,
            json!({}),
            "<user>a</user><assistant>b</assistant><user>c</user>\
             <assistant><think>x</think>\nd</assistant><assistant>",
        ),
    ];
    for (i, (source, messages, ending, variables, expected)) in cases.into_iter().enumerate() {
        let rendered = template(source).render(messages, ending, &kwargs(variables));
        assert_eq!(rendered.as_deref(), Ok(expected), "case {i}");
    }
}

#[test]
fn an_open_message_ends_with_its_content() {
    let cases = [
        (CHATML, "Sure: ", "<|im_start|>assistant\nSure: "),
        (LLAMA2, " Sure:  ", "[/INST] Sure:"), // the template strips
        (LLAMA3, "Sure", "assistant<|end_header_id|>\n\nSure"),
    ];
    for (source, content, expected) in cases {
        let messages = chat(&[("user", "Sure?"), ("assistant", content)]);
        let text = template(source)
            .render(&messages, Ending::OpenMessage, &Kwargs::new())
            .unwrap();
        assert!(text.ends_with(expected), "{text:?}");
    }
    for messages in [chat(&[]), chat(&[("user", "a"), ("assistant", " ")])] {
        let refused = template(ZEPHYR).render(&messages, Ending::OpenMessage, &Kwargs::new());
        assert!(matches!(refused, Err(TextError::Refused(_))));
    }
}

#[test]
fn refusals_say_why() {
    let assistant_first = chat(&[("assistant", "x")]);
    let refused = template(LLAMA2)
        .render(&assistant_first, Ending::Closed, &Kwargs::new())
        .unwrap_err();
    let message = "Roles must go user, assistant, user, ... after an optional system message";
    assert_eq!(refused, TextError::Refused(message.to_owned()));

    let user = chat(&[("user", "x")]);
    let reserved = template(ZEPHYR).render(&user, Ending::Closed, &kwargs(json!({"messages": []})));
    assert!(reserved.unwrap_err().to_string().contains("may not set messages"));

    let broken = ChatTemplate::new("line one\n{% for x in %}", [])
        .err()
        .expect("must not compile");
    assert!(
        matches!(&broken, TextError::BrokenTemplate(why) if why.contains("line 2")),
        "{broken}"
    );

    let fails = ChatTemplate::new("{{ messages[0].content.nonsense() }}", []).unwrap();
    let error = fails
        .render(&user, Ending::Closed, &Kwargs::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("nonsense") && error.contains("line 1"), "{error}");
}
