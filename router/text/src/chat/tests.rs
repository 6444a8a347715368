//! Templates against Jinja2's own output, open messages, refusals.

use super::calls::parse_tool_calls;
use super::*;

const LLAMA2: &str = include_str!("../fixture/llama2.jinja");
const LLAMA3: &str = include_str!("../fixture/llama3.jinja");
const CHATML: &str = include_str!("../fixture/chatml.jinja");
const ZEPHYR: &str = include_str!("../fixture/zephyr.jinja");
const THINKING: &str = include_str!("../fixture/thinking.jinja");
const PARTS: &str = include_str!("../fixture/parts.jinja");
const NINE: &str = include_str!("../fixture/nine.jinja");
const PRINTS: &str = include_str!("../fixture/printed.jinja");
const TOOLS: &str = include_str!("../fixture/tools.jinja");
const FIRST_PART: &str = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}";

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    ChatTemplate::new(
        source,
        tokens
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .into(),
    )
    .unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns
        .iter()
        .map(|&(role, content)| Message::new(role, content))
        .collect()
}

fn kwargs(json: Json) -> Kwargs {
    serde_json::from_value(json).unwrap()
}

/// A message as clients and training files write it.
fn message(json: &Json) -> Message {
    let mut fields = json.as_object().unwrap().clone();
    let content = match fields.remove("content") {
        Some(Json::String(text)) => Some(Content::Text(text)),
        Some(Json::Array(parts)) => Some(Content::Parts(
            parts
                .iter()
                .map(|part| part["text"].as_str().unwrap().to_owned())
                .collect(),
        )),
        _ => None,
    };
    Message {
        role: fields.remove("role").unwrap().as_str().unwrap().to_owned(),
        content,
        weight: None,
        fields,
    }
}

/// What transformers renders stands in the fixture, or null where the template refuses.
#[test]
fn conversations_render_as_in_transformers() {
    let fixture: Json = serde_json::from_str(include_str!("../fixture/python.json")).unwrap();
    let cases = fixture["conversations"].as_array().unwrap();
    assert!(cases.len() > 50);
    for case in cases {
        let source = match case["template"].as_str().unwrap() {
            "chatml" => CHATML,
            "llama2" => LLAMA2,
            "llama3" => LLAMA3,
            "nine" => NINE,
            "parts" => PARTS,
            "printed" => PRINTS,
            "thinking" => THINKING,
            "tools" => TOOLS,
            "zephyr" => ZEPHYR,
            other => panic!("{other} is not a template"),
        };
        let messages: Vec<Message> = case["messages"].as_array().unwrap().iter().map(message).collect();
        let ending = match case["ending"].as_str().unwrap() {
            "prompt" => Ending::GenerationPrompt,
            "open" => Ending::OpenMessage,
            _ => Ending::Closed,
        };
        let rendered = template(source).render(&messages, ending, &kwargs(case["variables"].clone()));
        match case["text"].as_str() {
            Some(expected) => assert_eq!(rendered.as_deref(), Ok(expected), "{case}"),
            None => assert!(matches!(rendered, Err(TextError::Refused(_))), "{case}"),
        }
    }
}

/// Where transformers refuses, or gives the model another text than the user means.
#[test]
fn an_open_message_may_be_blank_or_only_thought() {
    let thought = json!({"role": "assistant", "content": null, "reasoning_content": "Let me"});
    let cases = [
        (
            CHATML,
            json!({"role": "assistant", "content": " "}),
            "<|im_start|>assistant\n ",
        ),
        // The template strips, but the header's own newlines stay.
        (
            LLAMA3,
            json!({"role": "assistant", "content": ""}),
            "assistant<|end_header_id|>\n\n",
        ),
        (
            LLAMA3,
            json!({"role": "assistant", "content": " \n"}),
            "assistant<|end_header_id|>\n\n",
        ),
        (TOOLS, thought, "<assistant><think>Let me"),
        // Parts where the template reads a string, and a string where it reads parts.
        (
            CHATML,
            json!({"role": "assistant", "content": [{"text": "a"}, {"text": "<"}]}),
            "assistant\na\n<",
        ),
        (
            PARTS,
            json!({"role": "assistant", "content": "<"}),
            "<|assistant|>\n<",
        ),
        // A template that shows the first part alone gets all text in it.
        (
            FIRST_PART,
            json!({"role": "assistant", "content": [{"text": "a"}, {"text": "<"}]}),
            "assistant: a\n<",
        ),
        (
            FIRST_PART,
            json!({"role": "assistant", "content": "<"}),
            "assistant: <",
        ),
        (
            CHATML,
            json!({"role": "assistant", "content": "TheModelGoesOnHere0"}),
            "TheModelGoesOnHere0",
        ),
    ];
    for (source, last, expected) in cases {
        let messages = [Message::new("user", "hi"), message(&last)];
        let text = template(source)
            .render(&messages, Ending::OpenMessage, &Kwargs::new())
            .unwrap();
        assert!(text.ends_with(expected), "{text:?}");
    }
    let hides = "{% for m in messages %}{{ m.role }}: {{ m.content | length }}\n{% endfor %}";
    let (nothing, user) = (
        json!({"role": "assistant", "tool_calls": []}),
        Message::new("user", "hi"),
    );
    for (source, messages) in [
        (CHATML, vec![]),
        (CHATML, vec![message(&nothing)]),
        (hides, vec![user]),
    ] {
        let refused = template(source).render(&messages, Ending::OpenMessage, &Kwargs::new());
        assert!(matches!(refused, Err(TextError::Refused(why)) if why.contains("continue_final_message")));
    }
}

#[test]
fn content_is_given_as_the_template_reads_it() {
    let parts = json!([{"text": "one"}, {"text": "two"}]);
    let cases = [
        (PARTS, json!("one"), "<|user|>\none</s>"),
        (PARTS, parts.clone(), "<|user|>\none\ntwo</s>"),
        (CHATML, parts.clone(), "<|im_start|>user\none\ntwo<|im_end|>"),
        (TOOLS, json!("one"), "<user>one</user>"),
        (TOOLS, parts.clone(), "<user>one two</user>"), // as a list: its own separator
    ];
    for (source, content, expected) in cases {
        let messages = [message(&json!({"role": "user", "content": content}))];
        let text = template(source)
            .render(&messages, Ending::Closed, &Kwargs::new())
            .unwrap();
        assert!(text.contains(expected), "{text:?}");
    }
    // This template reads parts of users only.
    let system = [
        message(&json!({"role": "system", "content": parts})),
        Message::new("user", "x"),
    ];
    let text = template(TOOLS)
        .render(&system, Ending::Closed, &Kwargs::new())
        .unwrap();
    assert!(text.starts_with("<system>one\ntwo</system>"), "{text:?}");
    let developer = [Message::new("developer", "d"), Message::new("user", "x")];
    let text = template(TOOLS)
        .render(&developer, Ending::Closed, &Kwargs::new())
        .unwrap();
    assert!(text.starts_with("<system>d</system>"), "{text:?}");
}

#[test]
fn what_the_template_does_not_read_is_refused() {
    let user = chat(&[("user", "x")]);
    let refused = |source: &str, variables: Json| {
        template(source)
            .render(&user, Ending::Closed, &kwargs(variables))
            .err()
            .map(|error| error.to_string())
    };
    let read = [
        (
            TOOLS,
            json!({"tools": [{"function": {"name": "f", "parameters": {"properties": {}}}}]}),
        ),
        (TOOLS, json!({"enable_thinking": true, "reasoning_effort": "low"})),
        (
            ZEPHYR,
            json!({"enable_thinking": false, "reasoning_effort": "none", "tools": null, "documents": []}),
        ),
    ];
    for (source, variables) in read {
        assert_eq!(refused(source, variables.clone()), None, "{variables}");
    }
    let unread = [
        (
            ZEPHYR,
            json!({"tools": [{"function": {"name": "f"}}]}),
            "does not write tools into the prompt: start the server with --chat-template",
        ),
        (
            ZEPHYR,
            json!({"reasoning_effort": "high"}),
            "it reads only the messages",
        ),
        (
            TOOLS,
            json!({"enable_thinkin": true}),
            "it reads enable_thinking, rest, system, tools. Leave enable_thinkin out",
        ),
    ];
    for (source, variables, expected) in unread {
        let error = refused(source, variables).unwrap();
        assert!(error.contains(expected), "{error}");
    }
    let calls = json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]});
    let error = template(ZEPHYR)
        .render(&[message(&calls)], Ending::Closed, &Kwargs::new())
        .unwrap_err();
    assert!(
        error.to_string().contains("leaves the tool call \"weather\" out"),
        "{error}"
    );
}

/// `reasoning_effort` switches thinking where a template knows no more than on and off.
#[test]
fn effort_switches_thinking() {
    let user = chat(&[("user", "x")]);
    for (variables, thinks_not) in [
        (json!({}), false),
        (json!({"reasoning_effort": "high"}), false),
        (json!({"reasoning_effort": "none"}), true),
        (
            json!({"reasoning_effort": "none", "enable_thinking": true}),
            false,
        ),
    ] {
        let text = template(TOOLS)
            .render(&user, Ending::GenerationPrompt, &kwargs(variables.clone()))
            .unwrap();
        assert_eq!(text.ends_with("<think></think>"), thinks_not, "{variables}");
    }
}

#[test]
fn reasoning_is_read_under_each_of_its_names() {
    for read in REASONING {
        let source = format!("{{% for m in messages %}}{{{{ m.{read} or 'none' }}}},{{% endfor %}}");
        for sent in REASONING {
            let thought = message(&json!({"role": "assistant", "content": "a", sent: "hm"}));
            let text = template(&source)
                .render(
                    &[Message::new("user", "x"), thought],
                    Ending::Closed,
                    &Kwargs::new(),
                )
                .unwrap();
            assert_eq!(text, "none,hm,", "{sent} as {read}");
        }
    }
}

#[test]
fn tool_calls_are_parsed() {
    let call = |arguments: Json| json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
    for (arguments, parsed) in [
        (json!("{\"a\": 1}"), json!("{\"a\": 1}")),
        (json!({"a": 1}), json!({"a": 1})),
        (json!(" "), json!({})),
        (json!(null), json!({})),
    ] {
        assert_eq!(parse_tool_calls(call(arguments)).unwrap(), call(parsed));
    }
    for (calls, expected) in [
        (json!({}), "must be an array"),
        (json!([{"function": {}}]), "[0].function.name is missing"),
        (json!([{"type": "custom", "function": {"name": "f"}}]), "[0].type"),
        (
            json!([{"id": 7, "function": {"name": "f"}}]),
            "[0].id must be a text",
        ),
        (call(json!("{")), "[0].function.arguments is not JSON"),
        (call(json!("[1]")), "must be a JSON object"),
        (call(json!(3)), "must be a JSON object"),
    ] {
        let error = parse_tool_calls(calls).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// Whatever a client writes, each template gets what it can write.
#[test]
fn calls_are_given_as_the_template_reads_them() {
    let each = |inside: &str| {
        format!(
            "{{% for m in messages %}}{{{{ m.role }}}}:{{% if m.tool_calls %}}{{% for c in m.tool_calls %}}{inside}{{% endfor %}}\
             {{% else %}}{{{{ m.content }}}}{{% endif %}};{{% endfor %}}"
        )
    };
    let indexes = each("{{ c.function.name }}({{ c.function.arguments | tojson }})");
    let prints = each("{{ c.function.name ~ '(' ~ c.function.arguments ~ ')' }}");
    let adds = each("{{ c.function.name + '(' + c.function.arguments + ')' }}");
    let items = each(
        "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %})",
    );
    let nine = each(
        "{{ raise_exception('nine') if c.id | length != 9 }}{{ c.id }}{{ c.function.name }}{{ c.function.arguments | tojson }}",
    );
    let null =
        each("{% if m.content is none %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endif %}");
    let text = each("{{ '' + m.content }}{{ c.function.name }}{{ c.function.arguments | tojson }}");
    let cases = [
        (&indexes, "user:x;assistant:f({\"a\": 1e-07});tool:y;"),
        (&prints, "user:x;assistant:f({\"a\":1e-7});tool:y;"),
        (&adds, "user:x;assistant:f({\"a\":1e-7});tool:y;"),
        (&items, "user:x;assistant:f(a=1e-07);tool:y;"),
        (&nine, "user:x;assistant:123456789f{\"a\": 1e-07};tool:y;"),
        (&null, "user:x;assistant:f{\"a\": 1e-07};tool:y;"),
        (&text, "user:x;assistant:f{\"a\": 1e-07};tool:y;"),
    ];
    let call = json!({"role": "assistant", "content": null, "tool_calls": [
        {"type": "function", "id": "call_123456789", "function": {"name": "f", "arguments": "{\"a\":1e-7}"}}]});
    let messages = [
        Message::new("user", "x"),
        message(&call),
        message(&json!({"role": "tool", "content": "y", "tool_call_id": "call_123456789"})),
    ];
    for (source, expected) in cases {
        let template = template(source);
        let rendered = template.render(&messages, Ending::Closed, &Kwargs::new());
        assert_eq!(rendered.as_deref(), Ok(expected), "{source}");
        let wants_nine = template.call_ids() == CallIds::NineCharacters;
        assert_eq!(wants_nine, source == &nine, "{source}");
    }
}

#[test]
fn functions_of_the_older_form_become_tools() {
    let mut messages = [
        Message::new("user", "x"),
        message(&json!({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}})),
        message(&json!({"role": "function", "name": "f", "content": "y"})),
    ];
    modernise(&mut messages);
    let id = &messages[1].fields["tool_calls"][0]["id"];
    assert_eq!(
        (id, &messages[2].fields["tool_call_id"]),
        (&json!("call00001"), id)
    );
    assert_eq!(messages[2].role, "tool");
    let text = template(TOOLS)
        .render(&messages, Ending::Closed, &Kwargs::new())
        .unwrap();
    assert!(text.contains("<call f></call>"), "{text}");
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

    let broken = ChatTemplate::new("line one\n{% for x in %}", BTreeMap::new())
        .err()
        .expect("must not compile");
    assert!(
        matches!(&broken, TextError::BrokenTemplate(why) if why.contains("line 2")),
        "{broken}"
    );

    let fails = ChatTemplate::new("{{ messages[0].content.nonsense() }}", BTreeMap::new()).unwrap();
    let error = fails
        .render(&user, Ending::Closed, &Kwargs::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("nonsense") && error.contains("line 1"), "{error}");
}

/// A template comes with a model, from anywhere: each of these would hold a thread, or its memory, for minutes.
#[test]
fn a_template_has_limits() {
    const BYTES: &str = "its values and its text take more than 16777216 bytes";
    let cases = [
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "more than 10000000 steps",
        ),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "recursion limit",
        ),
        (
            "{{ [[1]] | tojson(indent=999999999999) }}",
            "tojson: the text would have more than",
        ),
        (
            "{{ [[1]] | tojson(indent=40000000) }}",
            "tojson: the text would have more than",
        ),
        (
            "{% set n = namespace(x=[]) %}{% for i in range(300) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
            "more than 200 levels",
        ),
        ("{{ 'x'.center(99999999) }}", "1048576 characters"),
        (
            "{% set x = 'x' * 9000000 %}{% for i in range(99) %}{{ x }}{% endfor %}",
            BYTES,
        ),
        // One step doubles, or multiplies, what there was.
        (
            "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            BYTES,
        ),
        (
            "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            BYTES,
        ),
        (
            "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
            BYTES,
        ),
        (
            "{% set x %}{% for i in range(99999) %}{% for i in range(9) %}a line of the template, again and again and again, \
          which nobody has counted before and which is kept until the end, longer than any line of text would have to be, and \
          longer still, because three hundred of its letters are what it takes to get there before the steps are used up \
          {% endfor %}{% endfor %}{% endset %}",
            BYTES,
        ),
        ("{{ 'x' * 999999999 }}", BYTES),
        (
            "{{ ('x' * 99999999)|length }}{{ ('x' * 99999999)|length }}{{ ('x' * 99999999)|length }}",
            BYTES,
        ),
        ("{% set x = 'x' * 99999 %}{{ x|replace('x', x) }}", BYTES),
        ("{% set x = 'x' * 99999 %}{{ x.replace('', x) }}", BYTES),
        ("{% set x = 'x' * 99999 %}{{ x.join(x) }}", BYTES),
        ("{% set x = 'x' * 99999 %}{{ ([x] * 99999)|join }}", BYTES),
        (
            "{% set x = 'x' * 99999 %}{{ ([x] * 99999)|map('upper')|list }}",
            BYTES,
        ),
        ("{% set x = 'x' * 99999 %}{{ ([x] * 99999)|string }}", BYTES),
        ("{% set x = 'x' * 99999 %}{{ ('{0}' * 99999).format(x) }}", BYTES),
        ("{{ ('\\n' * 99999)|indent(99999) }}", BYTES),
        ("{{ '%999999999s'|format(1) }}", "1048576 characters"),
        ("{{ ('x' * 99999999).split('x')|length }}", BYTES),
        ("{{ ([1] * 99999999)|list }}", "longer than the 1048576"),
        (
            "{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = n.l + n.l %}{% endfor %}",
            BYTES,
        ),
        (
            "{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l == n.l }}",
            BYTES,
        ),
        (
            "{% set n = namespace(l=[1]) %}{% for i in range(99999) %}{% set n.l = [n.l] %}{% endfor %}",
            "more than 200 levels",
        ),
        (
            "{% set n = namespace(l=[1]) %}{% for i in range(99999) %}{% set n.l = n.l|batch(1) %}{% endfor %}",
            "more than 200 levels",
        ),
        (
            "{% set n = namespace(l='x') %}{% for i in range(99999) %}{% set n.l = dict(a=n.l) %}{% endfor %}",
            "more than 200 levels",
        ),
        (
            "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
            "a namespace cannot be kept",
        ),
        (
            "{% set n = namespace() %}{% set n.n = [1]|map('default', n)|list %}{{ n }}",
            "a namespace cannot be kept",
        ),
        (
            "{% for i in range(99999) %}{% for i in range(9) %}{% macro m() %}{{ i }}{% endmacro %}{% endfor %}{% endfor %}",
            BYTES,
        ),
        (
            "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% if x.count('y') %}{% endif %}{% endfor %}",
            BYTES,
        ),
        (
            "{{ (range(10)|slice(1000000000))|list|length }}",
            "a list of 1000000000 items",
        ),
        // Searched for at each place nearly to its end.
        (
            "{% set h = 'a'*1000000 %}{% set n = 'a'*500000~'b' %}{% for i in range(9) %}{{ h.find(n) }}{% endfor %}",
            BYTES,
        ),
        (
            "{% set h = 'a'*1000000 %}{% set n = 'a'*500000~'b' %}{% for i in range(9) %}{{ n in h }}{% endfor %}",
            BYTES,
        ),
    ];
    let mut wrong = vec![];
    for (source, expected) in cases {
        let rendered = template(source).render(&chat(&[("user", "x")]), Ending::Closed, &Kwargs::new());
        match rendered {
            Err(error) if error.to_string().contains(expected) => {}
            Err(error) => wrong.push(format!("{source}: {error}")),
            Ok(text) => wrong.push(format!("{source}: {} bytes", text.len())),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_template_is_alone() {
    for source in [
        "{% include 'chat_template' %}",
        "{% import 'chat_template' as x %}",
        "{% extends 'chat_template' %}",
    ] {
        let error = ChatTemplate::new(source, BTreeMap::new())
            .and_then(|template| template.render(&chat(&[("user", "x")]), Ending::Closed, &Kwargs::new()))
            .unwrap_err();
        assert!(
            error.to_string().contains("a chat template is alone"),
            "{source}: {error}"
        );
    }
}
