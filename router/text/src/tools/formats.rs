//! The table. A template is looked at in this order, so that what is written by several families stands behind what is
//! written by one. (vLLM's vllm/tool_parsers and the models' chat templates.)

use super::{Layout, Piece, Syntax, ToolFormat};

const NAMED: Piece = Piece::Object {
    name: &["name"],
    arguments: &["arguments", "parameters"],
};

pub static FORMATS: &[ToolFormat] = &[ToolFormat {
    names: &["hermes", "qwen"],
    shows: &["<tool_call>"],
    syntax: Syntax::Layouts(&[Layout {
        open: "<tool_call>",
        begin: "\n",
        call: &[NAMED],
        separator: None,
        end: "\n</tool_call>",
    }]),
}];
