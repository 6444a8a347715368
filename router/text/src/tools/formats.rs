//! The table. A template is looked at in this order, so that what several families write stands behind what one writes.
//! No separator is how an end begins: a grammar reads the longest word. (The formats are those of vLLM's vllm/tool_parsers and of the models' own chat templates.)

use super::{Layout, Piece, Separator, Syntax, ToolFormat};

const NAMED: Piece = Piece::Object {
    name: &["name"],
    arguments: &["arguments", "parameters"],
};

const fn layouts(layouts: &'static [Layout]) -> Syntax {
    Syntax::Layouts { layouts, around: &[] }
}

/// A list of objects.
const fn list(open: &'static str, begin: &'static str, end: &'static str) -> Layout {
    Layout {
        open,
        begin,
        call: &[NAMED],
        separator: Separator::Within(", "),
        end,
    }
}

/// One call.
const fn one(open: &'static str, call: &'static [Piece], end: &'static str) -> Layout {
    Layout {
        open,
        begin: "",
        call,
        separator: Separator::Between(""),
        end,
    }
}

/// One call, in lines.
const fn lines(open: &'static str, call: &'static [Piece], end: &'static str) -> Layout {
    Layout {
        begin: "\n",
        separator: Separator::Between("\n"),
        ..one(open, call, end)
    }
}

const QWEN_CODER_ARGUMENTS: Piece = Piece::Tagged {
    open: "<parameter=",
    middle: ">\n",
    close: "\n</parameter>\n",
    end: "</function>",
};
const QWEN_CODER: &[Piece] = &[
    Piece::Text("<function="),
    Piece::Name,
    Piece::Text(">\n"),
    QWEN_CODER_ARGUMENTS,
];

const GLM_47: &[Piece] = &[
    Piece::Name,
    Piece::Tagged {
        open: "<arg_key>",
        middle: "</arg_key><arg_value>",
        close: "</arg_value>",
        end: "</tool_call>",
    },
];

const GLM_45: &[Piece] = &[
    Piece::Name,
    Piece::Text("\n"),
    Piece::Tagged {
        open: "<arg_key>",
        middle: "</arg_key>\n<arg_value>",
        close: "</arg_value>\n",
        end: "</tool_call>",
    },
];

const LLAMA: &[Piece] = &[Piece::Object {
    name: &["name"],
    arguments: &["parameters", "arguments"],
}];

const DEEPSEEK_V3: Layout = Layout {
    open: "<｜tool▁calls▁begin｜>",
    begin: "",
    call: &[
        Piece::Text("<｜tool▁call▁begin｜>function<｜tool▁sep｜>"),
        Piece::Name,
        Piece::Text("\n```json\n"),
        Piece::Arguments,
        Piece::Text("\n```<｜tool▁call▁end｜>"),
    ],
    separator: Separator::Within("\n"),
    end: "<｜tool▁calls▁end｜>",
};

const DEEPSEEK_V31: Layout = Layout {
    open: "<｜tool▁calls▁begin｜>",
    begin: "",
    call: &[
        Piece::Text("<｜tool▁call▁begin｜>"),
        Piece::Name,
        Piece::Text("<｜tool▁sep｜>"),
        Piece::Arguments,
        Piece::Text("<｜tool▁call▁end｜>"),
    ],
    separator: Separator::Within(""),
    end: "<｜tool▁calls▁end｜>",
};

const MISTRAL_LIST: Layout = list("[TOOL_CALLS]", "[", "]");
const MISTRAL: Layout = one(
    "[TOOL_CALLS]",
    &[Piece::Name, Piece::Text("[ARGS]"), Piece::Arguments],
    "",
);
const MISTRAL_ID: Layout = one(
    "[TOOL_CALLS]",
    &[
        Piece::Name,
        Piece::Text("[CALL_ID]"),
        Piece::Id("[a-zA-Z0-9]{9}"),
        Piece::Text("[ARGS]"),
        Piece::Arguments,
    ],
    "",
);
/// As it reads where `[ARGS]` was not shown.
const MISTRAL_BARE: Layout = one("[TOOL_CALLS]", &[Piece::Name, Piece::Arguments], "");

const FUNCTOOLS: Layout = list("functools", "[", "]");
const PHI_LIST: Layout = list("<|tool_call|>", "[", "]<|/tool_call|>");
const PHI: Layout = one("<|tool_call|>", &[NAMED], "<|/tool_call|>");

const fn python(
    open: &'static str,
    begin: &'static str,
    separator: &'static str,
    end: &'static str,
) -> Layout {
    Layout {
        open,
        begin,
        call: &[Piece::Name, Piece::Python],
        separator: Separator::Within(separator),
        end,
    }
}

pub static FORMATS: &[ToolFormat] = &[
    ToolFormat {
        names: &["openai"],
        shows: &[&["<|channel|>"]],
        syntax: Syntax::Channels,
    },
    ToolFormat {
        names: &["seed_oss"],
        shows: &[&["<seed:tool_call>"]],
        syntax: layouts(&[lines("<seed:tool_call>", QWEN_CODER, "\n</seed:tool_call>")]),
    },
    ToolFormat {
        names: &["qwen3_coder", "qwen3_xml", "mimo", "step3p5"],
        shows: &[&["<function=", "<parameter="]],
        syntax: layouts(&[
            lines("<tool_call>", QWEN_CODER, "\n</tool_call>"),
            one(
                "<function=",
                &[Piece::Name, Piece::Text(">\n"), QWEN_CODER_ARGUMENTS],
                "",
            ),
        ]),
    },
    ToolFormat {
        names: &["minimax_m2"],
        shows: &[&["<minimax:tool_call>"]],
        syntax: layouts(&[Layout {
            open: "<minimax:tool_call>",
            begin: "\n",
            call: &[
                Piece::Text("<invoke name=\""),
                Piece::Name,
                Piece::Text("\">\n"),
                Piece::Tagged {
                    open: "<parameter name=\"",
                    middle: "\">",
                    close: "</parameter>\n",
                    end: "</invoke>\n",
                },
            ],
            separator: Separator::Within(""),
            end: "</minimax:tool_call>",
        }]),
    },
    ToolFormat {
        names: &["glm45", "glm47"],
        shows: &[&["</arg_key><arg_value>"]],
        syntax: layouts(&[one("<tool_call>", GLM_47, "")]),
    },
    ToolFormat {
        names: &["glm45", "glm47"],
        shows: &[&["<arg_key>"]],
        syntax: layouts(&[Layout {
            begin: "",
            ..lines("<tool_call>", GLM_45, "")
        }]),
    },
    ToolFormat {
        names: &["kimi_k2"],
        shows: &[&["<|tool_calls_section_begin|>"]],
        syntax: layouts(&[Layout {
            open: "<|tool_calls_section_begin|>",
            begin: "",
            call: &[
                Piece::Text("<|tool_call_begin|>functions."),
                Piece::Name,
                Piece::Text(":"),
                Piece::Id("[0-9]{1,3}"),
                Piece::Text("<|tool_call_argument_begin|>"),
                Piece::Arguments,
                Piece::Text("<|tool_call_end|>"),
            ],
            separator: Separator::Within(""),
            end: "<|tool_calls_section_end|>",
        }]),
    },
    ToolFormat {
        names: &["deepseek_v3"],
        shows: &[&["<｜tool▁sep｜>", "```json"]],
        syntax: layouts(&[DEEPSEEK_V3, DEEPSEEK_V31]),
    },
    ToolFormat {
        names: &["deepseek_v31"],
        shows: &[&["<｜tool▁sep｜>"]],
        syntax: layouts(&[DEEPSEEK_V31, DEEPSEEK_V3]),
    },
    ToolFormat {
        names: &["mistral"],
        shows: &[&["[TOOL_CALLS]", "[CALL_ID]"]],
        syntax: layouts(&[MISTRAL_ID, MISTRAL, MISTRAL_LIST, MISTRAL_BARE]),
    },
    ToolFormat {
        names: &["mistral"],
        shows: &[&["[TOOL_CALLS]", "[ARGS]"]],
        syntax: layouts(&[MISTRAL, MISTRAL_ID, MISTRAL_LIST, MISTRAL_BARE]),
    },
    ToolFormat {
        names: &["mistral"],
        shows: &[&["[TOOL_CALLS]"]],
        syntax: layouts(&[MISTRAL_LIST, MISTRAL, MISTRAL_ID, MISTRAL_BARE]),
    },
    ToolFormat {
        names: &["gemma4"],
        shows: &[&["<|tool_call>"]],
        syntax: layouts(&[one(
            "<|tool_call>",
            &[Piece::Text("call:"), Piece::Name, Piece::Marked("<|\"|>")],
            "<tool_call|>",
        )]),
    },
    ToolFormat {
        names: &["functiongemma"],
        shows: &[&["<start_function_call>"]],
        syntax: layouts(&[one(
            "<start_function_call>",
            &[Piece::Text("call:"), Piece::Name, Piece::Marked("<escape>")],
            "<end_function_call>",
        )]),
    },
    ToolFormat {
        names: &["phi4_mini_json"],
        shows: &[&["functools["]],
        syntax: layouts(&[FUNCTOOLS, PHI_LIST, PHI]),
    },
    ToolFormat {
        names: &["phi4_mini_json"],
        shows: &[&["<|/tool_call|>"], &["<|/tool|>"]],
        syntax: layouts(&[PHI, PHI_LIST, FUNCTOOLS]),
    },
    ToolFormat {
        names: &["granite"],
        shows: &[&["<|tool_call|>"]],
        syntax: layouts(&[
            list("<|tool_call|>", "[", "]"),
            list("<tool_call>", "[", "]"),
            list("", "[", "]"),
        ]),
    },
    ToolFormat {
        names: &["olmo3"],
        shows: &[&["<function_calls>"]],
        syntax: layouts(&[python("<function_calls>", "", "\n", "</function_calls>")]),
    },
    ToolFormat {
        names: &["minicpm3"],
        shows: &[&["<|tool_call_start|>", "```python"]],
        syntax: layouts(&[Layout {
            call: &[Piece::Name, Piece::Python, Piece::Text("\n")],
            ..python(
                "<|tool_call_start|>",
                "\n```python\n",
                "",
                "```\n<|tool_call_end|>",
            )
        }]),
    },
    ToolFormat {
        names: &["lfm2"],
        shows: &[&["<|tool_call_start|>"], &["<|tool_list_start|>"]],
        syntax: layouts(&[python("<|tool_call_start|>", "[", ", ", "]<|tool_call_end|>")]),
    },
    ToolFormat {
        names: &["cohere_command3", "cohere_command4"],
        shows: &[&["<|START_ACTION|>"]],
        syntax: Syntax::Layouts {
            layouts: &[Layout {
                open: "<|START_ACTION|>",
                begin: "[\n    ",
                call: &[Piece::Object {
                    name: &["tool_name", "name"],
                    arguments: &["parameters", "arguments"],
                }],
                separator: Separator::Within(",\n    "),
                end: "\n]<|END_ACTION|>",
            }],
            around: &[
                "<|START_RESPONSE|>",
                "<|END_RESPONSE|>",
                "<|START_TEXT|>",
                "<|END_TEXT|>",
            ],
        },
    },
    ToolFormat {
        names: &["jamba"],
        shows: &[&["<tool_calls>"]],
        syntax: layouts(&[list("<tool_calls>", "[", "]</tool_calls>")]),
    },
    ToolFormat {
        names: &["hermes", "qwen", "granite4"],
        shows: &[&["<tool_call>"]],
        syntax: layouts(&[
            lines("<tool_call>", &[NAMED], "\n</tool_call>"),
            // Small models forget the opening.
            one("", &[NAMED], ""),
        ]),
    },
    ToolFormat {
        names: &["llama4_pythonic"],
        shows: &[&["<|python_start|>"]],
        syntax: layouts(&[
            python("", "[", ", ", "]"),
            python("<|python_start|>", "[", ", ", "]<|python_end|>"),
        ]),
    },
    ToolFormat {
        names: &["llama3_json", "llama4_json"],
        shows: &[
            &["<|python_tag|>"],
            &["<|eom_id|>"],
            &["<|start_header_id|>ipython"],
        ],
        syntax: layouts(&[
            Layout {
                separator: Separator::Within("; "),
                ..one("", LLAMA, "")
            },
            Layout {
                separator: Separator::Within("; "),
                ..one("<|python_tag|>", LLAMA, "")
            },
        ]),
    },
    ToolFormat {
        names: &["pythonic"],
        shows: &[],
        syntax: layouts(&[python("", "[", ", ", "]")]),
    },
    ToolFormat {
        names: &["glm4"],
        shows: &[&["<|observation|>"], &["[gMASK]<sop>"]],
        syntax: layouts(&[one("", &[Piece::Name, Piece::Text("\n"), Piece::Arguments], "")]),
    },
];
