//! Which format a chat template shows, and of which there is none.

use super::*;

/// What real templates hold that sets them apart, and the formats of tool calls and of reasoning.
type Row = (
    &'static str,
    &'static [&'static str],
    Option<&'static str>,
    Option<&'static str>,
);

const TEMPLATES: &[Row] = &[
    (
        "Qwen 2.5",
        &["<tools>", "<tool_call>\n{\"name\": <function-name>"],
        Some("hermes"),
        None,
    ),
    (
        "Qwen 3",
        &["<tool_call>\n{\"name\": <function-name>", "'</think>' in content"],
        Some("hermes"),
        Some("qwen3"),
    ),
    (
        "Qwen3-Coder",
        &["<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>"],
        Some("qwen3_coder"),
        None,
    ),
    (
        "Seed-OSS",
        &[
            "<seed:tool_call>\n<function=example_function_name>\n<parameter=",
            "</seed:think>",
        ],
        Some("seed_oss"),
        Some("seed_oss"),
    ),
    (
        "Llama 3.1",
        &["<|start_header_id|>ipython<|end_header_id|>", "<|python_tag|>"],
        Some("llama3_json"),
        None,
    ),
    (
        "Llama 3.2",
        &[
            "Environment: ipython",
            "<|start_header_id|>ipython<|end_header_id|>",
        ],
        Some("llama3_json"),
        None,
    ),
    ("Llama 4", &["<|python_start|>"], Some("llama4_pythonic"), None),
    (
        "functionary 3.1",
        &["<function=example_function_name>{"],
        None,
        None,
    ),
    ("Mistral Nemo", &["[TOOL_CALLS]["], Some("mistral"), None),
    (
        "Magistral",
        &["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"],
        Some("mistral"),
        Some("mistral"),
    ),
    (
        "Phi 4 mini",
        &["<|tool|>", "<|/tool|>"],
        Some("phi4_mini_json"),
        None,
    ),
    (
        "firefunction 2",
        &[" functools[{\"name\""],
        Some("phi4_mini_json"),
        None,
    ),
    ("Granite 3.0", &["<|tool_call|>"], Some("granite"), None),
    (
        "Granite 3.2",
        &["<|tool_call|>", "Here is my thought process:"],
        Some("granite"),
        Some("granite"),
    ),
    ("Granite 4", &["<tool_call></tool_call>"], Some("hermes"), None),
    ("Gemma 3", &["<start_of_turn>model"], None, None),
    (
        "FunctionGemma",
        &["<start_function_call>call:"],
        Some("functiongemma"),
        None,
    ),
    (
        "Gemma 4",
        &["<|tool_call>call:", "<|channel>thought", "<channel|>"],
        Some("gemma4"),
        Some("gemma4"),
    ),
    (
        "gpt-oss",
        &["<|channel|>analysis"],
        Some("openai"),
        Some("openai_gptoss"),
    ),
    (
        "DeepSeek V3",
        &["<｜tool▁sep｜>", "```json"],
        Some("deepseek_v3"),
        None,
    ),
    (
        "DeepSeek R1",
        &["<｜tool▁sep｜>", "```json", "</think>"],
        Some("deepseek_v3"),
        Some("qwen3"),
    ),
    (
        "DeepSeek V3.1",
        &["<｜tool▁sep｜>", "</think>"],
        Some("deepseek_v31"),
        Some("qwen3"),
    ),
    ("GLM 4", &["[gMASK]<sop>", "<|observation|>"], Some("glm4"), None),
    (
        "GLM 4.5",
        &[
            "[gMASK]<sop>",
            "<tool_call>{function-name}\n<arg_key>",
            "</think>",
            "<|observation|>",
        ],
        Some("glm45"),
        Some("qwen3"),
    ),
    (
        "OLMo 3",
        &["<function_calls>", "</think>"],
        Some("olmo3"),
        Some("qwen3"),
    ),
    (
        "Command R7B",
        &["<|START_ACTION|>", "<|END_THINKING|>", "```json"],
        Some("cohere_command3"),
        Some("cohere_command3"),
    ),
    (
        "Kimi K2",
        &["<|tool_calls_section_begin|>", "</think>"],
        Some("kimi_k2"),
        Some("qwen3"),
    ),
    (
        "MiniMax M2",
        &["<minimax:tool_call>", "</think>"],
        Some("minimax_m2"),
        Some("qwen3"),
    ),
    ("LFM 2", &["<|tool_list_start|>"], Some("lfm2"), None),
    (
        "MiniCPM 3",
        &["<|tool_call_start|>\n```python\n"],
        Some("minicpm3"),
        None,
    ),
    ("Jamba 1.5", &["<tool_calls>"], Some("jamba"), None),
];

#[test]
fn templates_show_their_formats() {
    for (model, texts, tools, reasoning) in TEMPLATES {
        let template = format!(
            "{{% for message in messages %}}{}{{% endfor %}}",
            texts.join("{{ x }}")
        );
        let shown = ToolFormat::of_template(&template).map(|format| format.names[0]);
        assert_eq!(shown, *tools, "{model}");
        let shown = ReasoningFormat::of_template(&template).map(|format| format.names[0]);
        assert_eq!(shown, *reasoning, "{model}");
    }
}
