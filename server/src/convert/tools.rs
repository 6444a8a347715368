//! Tools of a chat request: what is offered, and whether one must be called; OpenAI's newer form and its older one. Not here:
//! whether the model can write calls (the router knows its formats), how answers show them (http/chat.rs).

use serde_json::{Map, Value, json};
use tandem_openapi::tools::{
    AllowedTools, FunctionChoice, FunctionName, NamedChoice, NamedTool, ToolChoice as Asking,
};
use tandem_router::api::ToolChoice;
use tandem_text::chat::{BadTool, parse_tools};
use tandem_text::tools::Tool;

use crate::error::{ApiError, invalid};

/// As on the wire.
pub struct Asked {
    pub tools: Option<Vec<tandem_openapi::tools::Tool>>,
    pub tool_choice: Option<Asking>,
    pub parallel_tool_calls: Option<bool>,
    pub functions: Option<Vec<Map<String, Value>>>,
    pub function_call: Option<FunctionChoice>,
}

/// What the model may call, and how.
pub struct Offered {
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
    pub parallel: bool,
    pub form: Form,
}

/// How the answer shows calls: as the request offered functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `tool_calls`
    Tools,
    /// `function_call`, the older form, of one call.
    Functions,
}

pub fn offered(asked: Asked) -> Result<Offered, ApiError> {
    let Asked {
        tools,
        tool_choice,
        parallel_tool_calls,
        functions,
        function_call,
    } = asked;
    let given = tools.filter(|tools| !tools.is_empty());
    let functions = functions.filter(|functions| !functions.is_empty());
    match (given, functions) {
        (Some(_), Some(_)) => {
            let text = "functions is the older form of tools: send one of them";
            Err(invalid("functions", text))
        }
        (given, None) => {
            if let Some(FunctionChoice::Named(_)) = function_call {
                return Err(invalid(
                    "function_call",
                    "function_call needs functions; of tools it is tool_choice",
                ));
            }
            let tools = parsed("tools", given.map(listed).unwrap_or_default())?;
            let (tools, choice) = chosen(tools, tool_choice)?;
            Ok(Offered {
                tools,
                choice,
                parallel: parallel_tool_calls.unwrap_or(true),
                form: Form::Tools,
            })
        }
        (None, Some(functions)) => {
            if tool_choice.is_some() {
                return Err(invalid(
                    "tool_choice",
                    "tool_choice needs tools; of functions it is function_call",
                ));
            }
            let tool = |function: Map<String, Value>| json!({"type": "function", "function": function});
            let tools = parsed("functions", functions.into_iter().map(tool).collect())?;
            let choice = match function_call {
                None => ToolChoice::Auto,
                Some(FunctionChoice::Mode(mode)) => match mode.as_str() {
                    "auto" => ToolChoice::Auto,
                    "none" => ToolChoice::None,
                    _ => {
                        let text = format!(
                            "function_call must be auto, none or an object with a name, got {mode:?}"
                        );
                        return Err(invalid("function_call", text));
                    }
                },
                Some(FunctionChoice::Named(FunctionName { name })) => {
                    named(&tools, name, "function_call.name")?
                }
            };
            Ok(Offered {
                tools,
                choice,
                parallel: false,
                form: Form::Functions,
            })
        }
    }
}

/// Definitions of /tokenize, which only the template reads.
pub fn definitions(tools: Option<Vec<tandem_openapi::tools::Tool>>) -> Result<Vec<Tool>, ApiError> {
    parsed("tools", tools.map(listed).unwrap_or_default())
}

fn listed(tools: Vec<tandem_openapi::tools::Tool>) -> Vec<Value> {
    let tool = |tandem_openapi::tools::Tool { kind, function }| match function {
        Some(function) => json!({"type": kind, "function": function}),
        None => json!({"type": kind}),
    };
    tools.into_iter().map(tool).collect()
}

fn parsed(field: &str, tools: Vec<Value>) -> Result<Vec<Tool>, ApiError> {
    parse_tools(tools).map_err(|BadTool { place, problem }| {
        // Functions stand in their list as they are.
        let place = match field {
            "functions" => place.replacen(".function", "", 1),
            _ => place,
        };
        invalid(format!("{field}{place}"), format!("{field}{place}{problem}"))
    })
}

/// Whether and which must be called, and the tools among which the model chooses.
fn chosen(mut tools: Vec<Tool>, asking: Option<Asking>) -> Result<(Vec<Tool>, ToolChoice), ApiError> {
    let needs_tools = |choice: ToolChoice| match tools.is_empty() {
        true => Err(invalid(
            "tool_choice",
            "tool_choice needs tools, of which there are none",
        )),
        false => Ok(choice),
    };
    let choice = match asking {
        None => ToolChoice::Auto,
        Some(Asking::Mode(mode)) => match mode.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => needs_tools(ToolChoice::Required)?,
            _ => {
                let text = format!(
                    "tool_choice must be auto, none, required or an object that names a function, got {mode:?}{}",
                    if mode == "any" {
                        "; any is called required here"
                    } else {
                        ""
                    }
                );
                return Err(invalid("tool_choice", text));
            }
        },
        Some(Asking::Named(NamedChoice {
            kind,
            function,
            allowed_tools,
        })) => match (kind.as_str(), function, allowed_tools) {
            ("function", Some(FunctionName { name }), None) => {
                needs_tools(ToolChoice::Auto)?;
                named(&tools, name, "tool_choice.function.name")?
            }
            ("allowed_tools", None, Some(AllowedTools { mode, tools: allowed })) => {
                needs_tools(ToolChoice::Auto)?;
                let names = allowed_names(&tools, allowed)?;
                // The others are not offered at all: what the model does not know it cannot call.
                tools.retain(|tool| names.contains(&tool.name));
                match mode.as_str() {
                    "auto" => ToolChoice::Auto,
                    "required" => ToolChoice::Required,
                    _ => {
                        let text =
                            format!("tool_choice.allowed_tools.mode must be auto or required, got {mode:?}");
                        return Err(invalid("tool_choice.allowed_tools.mode", text));
                    }
                }
            }
            ("function", ..) => {
                return Err(invalid(
                    "tool_choice.function",
                    "tool_choice.function must be an object with a name",
                ));
            }
            ("allowed_tools", ..) => {
                let text = "tool_choice.allowed_tools must be an object with mode and tools";
                return Err(invalid("tool_choice.allowed_tools", text));
            }
            _ => {
                let hint = format!(": it is {kind:?}, only \"function\" and \"allowed_tools\" are built");
                let param = "tool_choice.type".to_owned();
                return Err(ApiError::NotBuilt { param, hint });
            }
        },
    };
    Ok((tools, choice))
}

fn named(tools: &[Tool], name: String, param: &str) -> Result<ToolChoice, ApiError> {
    match tools.iter().any(|tool| tool.name == name) {
        true => Ok(ToolChoice::Named(name)),
        false => Err(unknown(tools, &name, param)),
    }
}

fn unknown(tools: &[Tool], name: &str, param: &str) -> ApiError {
    let names: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).take(20).collect();
    invalid(
        param,
        format!(
            "{param} is {name:?}, which none of the tools is called: {}",
            names.join(", ")
        ),
    )
}

fn allowed_names(tools: &[Tool], allowed: Vec<NamedTool>) -> Result<Vec<String>, ApiError> {
    if allowed.is_empty() {
        let text = "tool_choice.allowed_tools.tools is empty: name at least one, or use tool_choice none";
        return Err(invalid("tool_choice.allowed_tools.tools", text));
    }
    let name = |(i, NamedTool { kind, function }): (usize, NamedTool)| {
        let param = format!("tool_choice.allowed_tools.tools[{i}]");
        match (kind.as_str(), function) {
            ("function", Some(FunctionName { name })) if tools.iter().any(|tool| tool.name == name) => {
                Ok(name)
            }
            ("function", Some(FunctionName { name })) => {
                Err(unknown(tools, &name, &format!("{param}.function.name")))
            }
            ("function", None) => Err(invalid(
                param.clone(),
                format!("{param} must have a function with a name"),
            )),
            _ => Err(ApiError::NotBuilt {
                param: format!("{param}.type"),
                hint: format!(": it is {kind:?}, only \"function\" is built"),
            }),
        }
    };
    allowed.into_iter().enumerate().map(name).collect()
}
