//! Texts as models write them.

use super::*;

/// The format's name, a text, its content and its calls.
type Case = (
    &'static str,
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
);

/// As the models' own templates write calls, so that an answer that is bound may be so, too.
const WRITTEN: &[Case] = &[
    (
        "hermes",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 3}}\n</tool_call>",
        "",
        &[("get_weather", "{\"city\": \"Paris\", \"days\": 3}")],
    ),
    (
        "hermes",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"set\", \"arguments\": {\"on\": true, \"tags\": [\"a\", \"{\\\"b\"]}}\n</tool_call>",
        "",
        &[
            ("now", "{}"),
            ("set", "{\"on\": true, \"tags\": [\"a\", \"{\\\"b\"]}"),
        ],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis <b> 3\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "",
        &[("get_weather", "{\"city\": \"Paris <b> 3\\n\", \"days\": 3}")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=set>\n<parameter=name>\nnull\n</parameter>\n<parameter=on>\ntrue\n</parameter>\n<parameter=tags>\n[\"a\", \"b\"]\n</parameter>\n<parameter=at>\n{\"x\": 1.5}\n</parameter>\n</function>\n</tool_call>",
        "",
        &[
            ("now", "{}"),
            (
                "set",
                "{\"name\": null, \"on\": true, \"tags\": [\"a\", \"b\"], \"at\": {\"x\": 1.5}}",
            ),
        ],
    ),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</seed:tool_call>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}")],
    ),
    (
        "minimax_m2",
        "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">S\u{e3}o \"Paulo\"</parameter>\n<parameter name=\"days\">2</parameter>\n</invoke>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>",
        "",
        &[
            (
                "get_weather",
                "{\"city\": \"S\u{e3}o \\\"Paulo\\\"\", \"days\": 2}",
            ),
            ("now", "{}"),
        ],
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\": \"Paris\"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "deepseek_v3",
        "<\u{ff5c}tool\u{2581}calls\u{2581}begin\u{ff5c}><\u{ff5c}tool\u{2581}call\u{2581}begin\u{ff5c}>function<\u{ff5c}tool\u{2581}sep\u{ff5c}>get_weather\n```json\n{\"city\": \"Paris\"}\n```<\u{ff5c}tool\u{2581}call\u{2581}end\u{ff5c}>\n<\u{ff5c}tool\u{2581}call\u{2581}begin\u{ff5c}>function<\u{ff5c}tool\u{2581}sep\u{ff5c}>now\n```json\n{}\n```<\u{ff5c}tool\u{2581}call\u{2581}end\u{ff5c}><\u{ff5c}tool\u{2581}calls\u{2581}end\u{ff5c}>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "deepseek_v31",
        "<\u{ff5c}tool\u{2581}calls\u{2581}begin\u{ff5c}><\u{ff5c}tool\u{2581}call\u{2581}begin\u{ff5c}>get_weather<\u{ff5c}tool\u{2581}sep\u{ff5c}>{\"city\": \"Paris\"}<\u{ff5c}tool\u{2581}call\u{2581}end\u{ff5c}><\u{ff5c}tool\u{2581}call\u{2581}begin\u{ff5c}>now<\u{ff5c}tool\u{2581}sep\u{ff5c}>{}<\u{ff5c}tool\u{2581}call\u{2581}end\u{ff5c}><\u{ff5c}tool\u{2581}calls\u{2581}end\u{ff5c}>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "gemma4",
        "<|tool_call>call:set{name:<|\"|>x, {y}<|\"|>,on:true,tags:[<|\"|>a<|\"|>,<|\"|>b\"<|\"|>],at:{x:-2,label:<|\"|>here<|\"|>}}<tool_call|><|tool_call>call:now{}<tool_call|>",
        "",
        &[
            (
                "set",
                "{\"name\": \"x, {y}\", \"on\": true, \"tags\": [\"a\", \"b\\\"\"], \"at\": {\"x\": -2, \"label\": \"here\"}}",
            ),
            ("now", "{}"),
        ],
    ),
    (
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>New York<escape>,days:3}<end_function_call>",
        "",
        &[("get_weather", "{\"city\": \"New York\", \"days\": 3}")],
    ),
    (
        "olmo3",
        "<function_calls>get_weather(city=\"Paris\", days=3)\nset(on=true, tags=[\"a\", \"it's\"], at={\"x\": 1e3})\nnow()</function_calls>",
        "",
        &[
            ("get_weather", "{\"city\": \"Paris\", \"days\": 3}"),
            (
                "set",
                "{\"on\": true, \"tags\": [\"a\", \"it's\"], \"at\": {\"x\": 1e3}}",
            ),
            ("now", "{}"),
        ],
    ),
    (
        "minicpm3",
        "<|tool_call_start|>\n```python\nget_weather(city=\"Paris\")\nnow()\n```\n<|tool_call_end|>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "lfm2",
        "<|tool_call_start|>[get_weather(city=\"Paris\"), now()]<|tool_call_end|>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "cohere_command3",
        "<|START_ACTION|>[\n    {\"tool_name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}},\n    {\"tool_name\": \"now\", \"parameters\": {}}\n]<|END_ACTION|>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "jamba",
        "<tool_calls>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"now\", \"arguments\": {}}]</tool_calls>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "granite",
        "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"now\", \"arguments\": {}}]",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "llama3_json",
        "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}; {\"name\": \"now\", \"parameters\": {}}",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
    ),
    (
        "llama4_pythonic",
        "[get_weather(city=\"Paris\", unit=\"C\"), now()]",
        "",
        &[
            ("get_weather", "{\"city\": \"Paris\", \"unit\": \"C\"}"),
            ("now", "{}"),
        ],
    ),
    (
        "pythonic",
        "[get_weather(city=\"Paris\")]",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}")],
    ),
    (
        "glm4",
        "get_weather\n{\"city\": \"Paris\"}",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}")],
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Paris\"}",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}")],
    ),
];

/// Which rows of one name write so is told by their templates.
const WRITTEN_BY: &[(&str, &str, &str)] = &[
    (
        "mistral",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"now\", \"arguments\": {}}]",
    ),
    (
        "mistral",
        "[TOOL_CALLS] [ARGS]",
        "[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]now[ARGS]{}",
    ),
    (
        "mistral",
        "[TOOL_CALLS] [ARGS] [CALL_ID]",
        "[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]now[CALL_ID]000000000[ARGS]{}",
    ),
    (
        "glm45",
        "<arg_key>",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    ),
    (
        "glm47",
        "</arg_key><arg_value>",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call><tool_call>now</tool_call>",
    ),
    (
        "phi4_mini_json",
        "functools[",
        "functools[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"now\", \"arguments\": {}}]",
    ),
    (
        "phi4_mini_json",
        "<|/tool_call|>",
        "<|tool_call|>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}<|/tool_call|><|tool_call|>{\"name\": \"now\", \"arguments\": {}}<|/tool_call|>",
    ),
];

/// What models write besides: other spellings, text around calls, and what is no call.
const READ: &[Case] = &[
    ("hermes", "Hello.", "Hello.", &[]),
    (
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [\"</tool_call>\", \"<tool_call>\", \"{\\\"b\"]}}</tool_call>",
        "",
        &[("f", "{\"a\": [\"</tool_call>\", \"<tool_call>\", \"{\\\"b\"]}")],
    ),
    ("hermes", "  \n", "  \n", &[]),
    ("hermes", "a < b <tool> <tool_cal", "a < b <tool> <tool_cal", &[]),
    (
        "hermes",
        "Let me look.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"q\": \"\u{1f980} \\u00e9\"}}\n</tool_call>\n\n",
        "Let me look.",
        &[("f", "{\"q\": \"\u{1f980} \\u00e9\"}")],
    ),
    (
        "hermes",
        "One.<tool_call>{\"arguments\":{\"a\":[1,{\"b\":null}]},\"id\":[{}],\"name\":\"f\"}</tool_call> Two. <tool_call>{\"name\":\"g\",\"parameters\":\"{\\\"a\\\": \\\"\\u00e9\\ud83e\\udd80\\\"}\"}</tool_call>",
        "One. Two.",
        &[
            ("f", "{\"a\":[1,{\"b\":null}]}"),
            ("g", "{\"a\": \"\u{e9}\u{1f980}\"}"),
        ],
    ),
    (
        "hermes",
        "<tool_call>{\"name\": \"f\"}</tool_call>",
        "",
        &[("f", "{}")],
    ),
    (
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": null}</tool_call>",
        "",
        &[("f", "{}")],
    ),
    (
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x\ny\"}}",
        "",
        &[("f", "{\"a\": \"x\\ny\"}")],
    ),
    // An end that is missing, and one too many.
    (
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}</tool_call>",
        "",
        &[("f", "{\"a\": 1}")],
    ),
    (
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}}</tool_call>.",
        "}.",
        &[("f", "{\"a\": 1}")],
    ),
    // Without its opening, which counts with the name of a tool.
    (
        "hermes",
        "{\"name\": \"now\", \"arguments\": {}}",
        "",
        &[("now", "{}")],
    ),
    (
        "hermes",
        "{\"name\": \"Felix\", \"arguments\": 3}",
        "{\"name\": \"Felix\", \"arguments\": 3}",
        &[],
    ),
    // Cut by the length: the call goes as far as it does.
    (
        "hermes",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"bc",
        "",
        &[("f", "{\"a\": \"bc")],
    ),
    (
        "hermes",
        "<tool_call>\n{\"name\": \"f\", \"argum",
        "<tool_call>\n{\"name\": \"f\", \"argum",
        &[],
    ),
    (
        "hermes",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_c",
        "",
        &[("f", "{}")],
    ),
    // No call.
    (
        "hermes",
        "<tool_call>not json</tool_call>",
        "<tool_call>not json</tool_call>",
        &[],
    ),
    (
        "hermes",
        "<tool_call>{\"arguments\": {}}</tool_call> x",
        "<tool_call>{\"arguments\": {}}</tool_call> x",
        &[],
    ),
    (
        "hermes",
        "<tool_call>{\"name\": 3, \"arguments\": {}}",
        "<tool_call>{\"name\": 3, \"arguments\": {}}",
        &[],
    ),
    (
        "hermes",
        "<tool_call> <tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
        "<tool_call>",
        &[("f", "{}")],
    ),
    (
        "qwen3_coder",
        "I do.\n<tool_call>\n<function=set>\n<parameter=on>\nTrue\n</parameter>\n<parameter=tags>\n['a', \"b\"]\n</parameter>\n<parameter=name>\n</parameter>\n</function>\n</tool_call>\n",
        "I do.",
        &[("set", "{\"on\": true, \"tags\": [\"a\", \"b\"], \"name\": \"\"}")],
    ),
    // Without its opening, without ends, unknown, cut.
    (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\nmany\n</function>",
        "",
        &[("get_weather", "{\"city\": \"Paris\", \"days\": \"many\"}")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>",
        "",
        &[("f", "{\"a\": \"3\"}")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar</para",
        "",
        &[("get_weather", "{\"city\": \"Par")],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather\nno</tool_call>",
        "<tool_call>\n<function=get_weather\nno</tool_call>",
        &[],
    ),
    (
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>\n Paris </arg_value><arg_key>days</arg_key><arg_value> 3</arg_value></tool_call>",
        "",
        &[("get_weather", "{\"city\": \"\\n Paris \", \"days\": 3}")],
    ),
    ("glm45", "<tool_call>now</tool_call> x", " x", &[("now", "{}")]),
    (
        "deepseek_v31",
        "Hm.<\u{ff5c}tool\u{2581}calls\u{2581}begin\u{ff5c}><\u{ff5c}tool\u{2581}call\u{2581}begin\u{ff5c}>function<\u{ff5c}tool\u{2581}sep\u{ff5c}>now\n```json\n{}\n```<\u{ff5c}tool\u{2581}call\u{2581}end\u{ff5c}><\u{ff5c}tool\u{2581}calls\u{2581}end\u{ff5c}>",
        "Hm.",
        &[("now", "{}")],
    ),
    (
        "mistral",
        "[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"[TOOL_CALLS]\"}, \"id\": \"000000000\"}]",
        "",
        &[("get_weather", "{\"city\": \"[TOOL_CALLS]\"}")],
    ),
    (
        "mistral",
        "Well.[TOOL_CALLS]f{\"a\": [1]}[TOOL_CALLS]g[ARGS]{\"b\": {}}",
        "Well.",
        &[("f", "{\"a\": [1]}"), ("g", "{\"b\": {}}")],
    ),
    (
        "mistral",
        "[TOOL_CALLS] is a token.",
        "[TOOL_CALLS] is a token.",
        &[],
    ),
    (
        "phi4_mini_json",
        "<|tool_call|>[{\"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": {\"a\": 1}}}]<|/tool_call|>",
        "",
        &[("f", "{\"a\": 1}")],
    ),
    (
        "granite",
        "<tool_call>[{\"name\": \"f\", \"arguments\": {}}]",
        "",
        &[("f", "{}")],
    ),
    (
        "granite",
        "[{\"name\": \"now\", \"arguments\": {}}]",
        "",
        &[("now", "{}")],
    ),
    (
        "granite",
        "[{\"name\": \"f\", \"arguments\": {}}]",
        "[{\"name\": \"f\", \"arguments\": {}}]",
        &[],
    ),
    (
        "functiongemma",
        "<start_function_call>call:set{on:<escape>True<escape>,tags:<escape>[\"a\"]<escape>,name:x y}<end_function_call>",
        "",
        &[("set", "{\"on\": true, \"tags\": [\"a\"], \"name\": \"x y\"}")],
    ),
    (
        "pythonic",
        " [get_weather(city='O\\'Neill \\x41\\u00e9\\n\"', days=-1_000,), set(on=True, tags=('a', \"\"\"b\n'c\"\"\", r'\\d', ''), name=None, at={'x': .5, 2: [+1, 0x1F, 07]})]",
        "",
        &[
            (
                "get_weather",
                "{\"city\": \"O'Neill A\u{e9}\\n\\\"\", \"days\": -1000}",
            ),
            (
                "set",
                "{\"on\": true, \"tags\": [\"a\", \"b\\n'c\", \"\\\\d\", \"\"], \"name\": null, \"at\": {\"x\": 0.5, \"2\": [1, 31, 7]}}",
            ),
        ],
    ),
    (
        "pythonic",
        "[get_weather(the city)]",
        "[get_weather(the city)]",
        &[],
    ),
    (
        "pythonic",
        "[get_news(city='Paris')]",
        "[get_news(city='Paris')]",
        &[],
    ),
    ("pythonic", "See [now()].", "See [now()].", &[]),
    ("pythonic", "[1, 2]", "[1, 2]", &[]),
    (
        "llama4_pythonic",
        "<|python_start|>[get_weather(city='Paris')]<|python_end|>",
        "",
        &[("get_weather", "{\"city\": \"Paris\"}")],
    ),
    (
        "llama3_json",
        "<|python_tag|>{\"type\": \"function\", \"name\": \"get_weather\", \"parameters\": {\"city\": \"a; b\"}} ;{\"type\": \"function\", \"function\": \"now\", \"parameters\": {}}",
        "",
        &[("get_weather", "{\"city\": \"a; b\"}"), ("now", "{}")],
    ),
    (
        "llama3_json",
        "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"a\"}}\n\nDone.",
        "\n\nDone.",
        &[("get_weather", "{\"city\": \"a\"}")],
    ),
    (
        "llama3_json",
        "{\"name\": \"Felix\", \"parameters\": {}}",
        "{\"name\": \"Felix\", \"parameters\": {}}",
        &[],
    ),
    (
        "llama3_json",
        "{\"a\": {\"b\": 1}} is JSON.",
        "{\"a\": {\"b\": 1}} is JSON.",
        &[],
    ),
    (
        "llama3_json",
        "So: {\"name\": \"now\", \"parameters\": {}}",
        "So: {\"name\": \"now\", \"parameters\": {}}",
        &[],
    ),
    ("glm4", "get_weather is a tool.", "get_weather is a tool.", &[]),
    ("glm4", "now\n{}\n", "", &[("now", "{}")]),
    (
        "cohere_command3",
        "<|START_RESPONSE|>Hello.<|END_RESPONSE|>",
        "Hello.",
        &[],
    ),
    (
        "cohere_command3",
        "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"f\", \"parameters\": {}}\n]<|END_ACTION|>",
        "",
        &[("f", "{}")],
    ),
    (
        "openai",
        " to=functions.f<|channel|>commentary json<|message|>{}<|call|><|start|>assistant<|channel|>commentary to=now<|message|><|call|>",
        "",
        &[("f", "{}"), ("now", "{}")],
    ),
    (
        "openai",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>It is <|x|> 3.<|return|>",
        "I look.\nIt is <|x|> 3.",
        &[],
    ),
    ("openai", "Hello <there>", "Hello <there>", &[]),
    ("openai", "<|channel|>final<|message|>Hel", "Hel", &[]),
];

fn check(format: &'static ToolFormat, text: &str, content: &str, calls: &[(&str, &str)]) {
    let reading = Reading {
        tools: Some(format),
        reasoning: match format.syntax {
            Syntax::Channels => ReasoningFormat::named("openai_gptoss"),
            Syntax::Layouts { .. } => None,
        },
        is_opened: false,
    };
    let answer = read_in_all_ways(reading, &tools(), text);
    let calls: Vec<_> = calls
        .iter()
        .map(|&(name, text)| (name.to_owned(), text.to_owned()))
        .collect();
    assert_eq!(answer.calls, calls, "{} {text}", format.names[0]);
    assert_eq!(answer.content, content, "{} {text}", format.names[0]);
}

#[test]
fn texts_of_every_format_are_read() {
    for &(name, text, content, calls) in WRITTEN.iter().chain(READ) {
        for format in formats(name) {
            check(format, text, content, calls);
        }
    }
    for (name, _, text) in WRITTEN_BY {
        for format in formats(name) {
            check(
                format,
                text,
                "",
                &[("get_weather", "{\"city\": \"Paris\"}"), ("now", "{}")],
            );
        }
    }
    let missing = FORMATS.iter().find(|format| {
        let names = WRITTEN
            .iter()
            .map(|(name, ..)| name)
            .chain(WRITTEN_BY.iter().map(|(name, ..)| name));
        !names.into_iter().any(|name| format.names.contains(name))
    });
    assert!(missing.is_none(), "no text of {missing:?}");
}

#[test]
fn without_tools_calls_are_content() {
    let reading = Reading::default();
    for (_, text, ..) in WRITTEN {
        assert_eq!(read_in_all_ways(reading, &tools(), text).content, *text);
    }
}

#[test]
fn reasoning_comes_before_the_answer() {
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let with_call = |text: &str| format!("{text}{call}");
    for (name, is_opened, text, reasoning, content, n_calls) in [
        ("qwen3", false, "<think>\na\n</think>\n\nb".to_owned(), "\na\n", "\n\nb", 0),
        ("qwen3", false, "\n<think>a < b</think>b</think>".to_owned(), "a < b", "b</think>", 0),
        ("qwen3", false, "b <think>c</think>".to_owned(), "", "b <think>c</think>", 0),
        ("qwen3", false, " <thinker>".to_owned(), "", " <thinker>", 0),
        ("qwen3", false, "<thi".to_owned(), "", "<thi", 0),
        ("qwen3", true, "a</think>b".to_owned(), "a", "b", 0),
        ("qwen3", true, "<think>a</think>b".to_owned(), "a", "b", 0),
        ("qwen3", true, "a</thin".to_owned(), "a</thin", "", 0),
        ("qwen3", false, with_call("<think>a</think>\n\n"), "a", "", 1),
        ("qwen3", true, with_call("a\n"), "a\n", "", 1),
        ("qwen3", true, "a <tool_call> b</think>c".to_owned(), "a <tool_call> b", "c", 0),
        ("deepseek_r1", true, with_call("a</think>b "), "a", "b", 1),
        ("deepseek_r1", true, with_call("a"), "a<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>", "", 0),
        ("mistral", false, "[THINK]a[/THINK]b".to_owned(), "a", "b", 0),
        ("granite", false, "Here's my thought process: a Here is my response: b".to_owned(), " a ", " b", 0),
        ("granite", false, "Here is it.".to_owned(), "", "Here is it.", 0),
        ("gemma4", false, "<|channel>thought\na<channel|>b".to_owned(), "a", "b", 0),
        ("cohere_command3", false, "<|START_THINKING|>a<|END_THINKING|>b".to_owned(), "a", "b", 0),
        ("openai_gptoss", false, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>c".to_owned(), "a\nb", "c", 0),
    ] {
        let reading = Reading {
            tools: ToolFormat::named("hermes"),
            reasoning: ReasoningFormat::named(name),
            is_opened,
        };
        let answer = read_in_all_ways(reading, &tools(), &text);
        let expected = (reasoning, content, n_calls);
        assert_eq!((answer.reasoning.as_str(), answer.content.as_str(), answer.calls.len()), expected, "{name} {text}");
    }
}

/// Over an alphabet of marks and parts of calls, so that what is malformed in every way is the rule: however it is cut, it
/// is read alike, and without calls nothing of it is lost.
#[test]
fn cuts_do_not_matter() {
    let mut random = Random(5);
    for format in FORMATS {
        let mut parts = vec![
            "{",
            "}",
            "[",
            "]",
            "(",
            ")",
            "\"",
            "'",
            ",",
            ":",
            "=",
            "; ",
            " ",
            "\n",
            "a",
            "now",
            "get_weather",
            "city",
            "3",
            "\\",
            "\u{e9}",
            "<",
            "{\"name\": \"now\", ",
            "\"arguments\": {}}",
            "\"parameters\": {\"city\": \"x\"}}",
            "<think>",
            "</think>",
        ];
        match format.syntax {
            Syntax::Layouts { layouts, .. } => parts.extend(layouts.iter().flat_map(Layout::texts)),
            Syntax::Channels => {
                parts.extend(
                    channels::MARKS
                        .iter()
                        .chain(&["analysis", "to=functions.now", "final"]),
                )
            }
        }
        for n in 0..400 {
            let text: String = (0..random.below(16))
                .map(|_| parts[random.below(parts.len())])
                .collect();
            let reading = Reading {
                tools: Some(format),
                reasoning: ReasoningFormat::named(["qwen3", "deepseek_r1"][n % 2]).filter(|_| n % 3 == 0),
                is_opened: n % 6 == 0,
            };
            let answer = read_in_all_ways(reading, &tools(), &text);
            let is_plain =
                reading.reasoning.is_none() && format.around().is_empty() && !reading.has_channels();
            if answer.calls.is_empty() && is_plain {
                assert_eq!(answer.content, text, "{}", format.names[0]);
            }
        }
    }
}

/// Nothing is held longer than it may be the beginning of a mark, and arguments come as they are written.
#[test]
fn deltas_come_at_once() {
    let reading = Reading {
        tools: ToolFormat::named("hermes"),
        reasoning: ReasoningFormat::named("qwen3"),
        is_opened: true,
    };
    let mut reader = Reader::new(reading, tools());
    let argued = |index, name: Option<&str>, arguments: &str| Delta {
        calls: vec![CallDelta {
            index,
            name: name.map(str::to_owned),
            arguments: arguments.to_owned(),
        }],
        ..Delta::default()
    };
    let said = |reasoning: &str, content: &str| Delta {
        reasoning: reasoning.to_owned(),
        content: content.to_owned(),
        calls: vec![],
    };
    for (piece, delta) in [
        ("so", said("so", "")),
        (" </", said(" ", "")),
        ("b>", said("</b>", "")),
        ("</think>", said("", "")),
        ("Well", said("", "Well")),
        (", <t", said("", ",")),
        ("ool_call>{\"name\": \"f", said("", "")),
        ("\", \"arguments\": ", said("", "")),
        ("{\"a", argued(0, Some("f"), "{\"a")),
        ("\": [1, ", argued(0, None, "\": [1, ")),
        ("2]}", argued(0, None, "2]}")),
        ("}</tool_call>", said("", "")),
        ("\n", said("", "")),
        ("x", said("", " \nx".trim_start_matches(' '))),
    ] {
        let expected: Vec<Delta> = [delta].into_iter().filter(|delta| !delta.is_empty()).collect();
        assert_eq!(reader.push(piece), expected, "{piece:?}");
    }
    let reading = Reading {
        tools: ToolFormat::named("qwen3_coder"),
        ..Reading::default()
    };
    let mut reader = Reader::new(reading, tools());
    for (piece, delta) in [
        (
            "<tool_call>\n<function=get_weather>\n<parameter=city>\n",
            said("", ""),
        ),
        ("Par", argued(0, Some("get_weather"), "{\"city\": \"Par")),
        ("is\n", argued(0, None, "is")),
        ("</parameter>", argued(0, None, "\"")),
        ("\n<parameter=days>\n3", said("", "")),
        ("\n</parameter>", argued(0, None, ", \"days\": 3")),
        ("\n</function>", argued(0, None, "}")),
    ] {
        let expected: Vec<Delta> = [delta].into_iter().filter(|delta| !delta.is_empty()).collect();
        assert_eq!(reader.push(piece), expected, "{piece:?}");
    }
}

/// Content behind a call stands behind it, however much is read at once.
#[test]
fn deltas_keep_the_order_of_the_text() {
    let reading = Reading {
        tools: ToolFormat::named("hermes"),
        reasoning: ReasoningFormat::named("qwen3"),
        is_opened: true,
    };
    let call = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
    let text = format!("so</think>Well {call}and then {call}");
    let shown = |deltas: Vec<Delta>| {
        let parts = deltas.into_iter().map(
            |Delta {
                 reasoning,
                 content,
                 calls,
             }| {
                let calls: String = calls.iter().map(|call| format!("[{}]", call.arguments)).collect();
                format!("{reasoning}|{content}{calls}")
            },
        );
        parts.collect::<Vec<_>>()
    };
    let whole = shown(Reader::new(reading, tools()).push(&text));
    assert_eq!(whole, ["so|Well[{}]", "|and then[{}]"]);
}

pub(super) fn written() -> Vec<(&'static ToolFormat, &'static str)> {
    let by_name = WRITTEN
        .iter()
        .flat_map(|&(name, text, ..)| formats(name).into_iter().map(move |format| (format, text)));
    let by_template = WRITTEN_BY.iter().map(|&(name, template, text)| {
        let format = ToolFormat::named(name).expect("a format").shown_in(template);
        (format, text)
    });
    by_name.chain(by_template).collect()
}

/// A text made to be read again and again.
#[test]
fn reading_takes_no_longer_than_the_text() {
    let text = "<tool_call>{\"arguments\":[\"".repeat(2_000);
    for format in FORMATS {
        let reading = Reading {
            tools: Some(format),
            ..Reading::default()
        };
        assert!(read(reading, &tools(), &[&text]).calls.is_empty());
    }
}
