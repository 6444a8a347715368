//! Anthropic's requests become chat requests, which have the checks. What the two call differently is named here, so that a
//! refusal speaks of the field that was sent ([`WORDS`]). The answer is shaped in http/messages.rs.

use serde_json::{Map, Value, json};
use tandem_openapi::chat::{ChatContent, ChatMessage, ChatRequest};
use tandem_openapi::common::Strings;
use tandem_openapi::messages::{
    AnthropicTool, AnthropicToolChoice, CountTokensRequest, InputBlock, InputMessage, MessagesRequest,
    OutputConfig, OutputFormat, TextBlock, TextOrBlocks, TextOrTexts, Thinking,
};
use tandem_openapi::structured::{NamedSchema, ResponseFormat};
use tandem_openapi::tools::{FunctionName, NamedChoice, Tool, ToolChoice};
use tandem_router::api::Reasoning;

use super::turns::{self, content, needed, not_built, say, turn};
use crate::error::{ApiError, invalid};

/// A field of chat's, and what it is here.
pub const WORDS: &[(&str, &str)] = &[
    ("].function.parameters", "].input_schema"),
    ("].function.", "]."),
    ("tool_choice.function.name", "tool_choice.name"),
    (
        "response_format.json_schema.schema",
        "output_config.format.schema",
    ),
    ("reasoning_effort", "output_config.effort"),
    ("thinking_token_budget", "thinking.budget_tokens"),
    ("stop[", "stop_sequences["),
    ("stop has", "stop_sequences has"),
];

/// The variable of chat templates that turns thinking on and off.
const ENABLE_THINKING: &str = "enable_thinking";
pub fn chat(request: MessagesRequest, reasoning: Reasoning) -> Result<ChatRequest, ApiError> {
    let MessagesRequest {
        model,
        messages,
        max_tokens,
        system,
        stop_sequences,
        temperature,
        top_p,
        top_k,
        stream,
        tools,
        tool_choice,
        thinking,
        output_config,
        seed,
        chat_template_kwargs,
    } = request;
    if let Some(budget) = thinking.as_ref().and_then(|thinking| thinking.budget_tokens)
        && !(1..max_tokens).contains(&budget)
    {
        let text = format!(
            "thinking.budget_tokens must be at least 1 and less than max_tokens, which is {max_tokens}; got {budget}"
        );
        return Err(invalid("thinking.budget_tokens", text));
    }
    let prompt = CountTokensRequest {
        model,
        messages,
        system,
        tools,
        tool_choice,
        thinking,
        output_config,
        chat_template_kwargs,
    };
    Ok(ChatRequest {
        max_tokens: Some(max_tokens),
        stop: stop_sequences.map(Strings::Many),
        temperature,
        top_p,
        top_k,
        stream,
        seed,
        ..prompt_of(prompt, reasoning)?
    })
}

/// A chat request with all that its prompt is made of.
pub fn prompt_of(request: CountTokensRequest, reasoning: Reasoning) -> Result<ChatRequest, ApiError> {
    let CountTokensRequest {
        model,
        messages: given,
        system,
        tools,
        tool_choice,
        thinking,
        output_config,
        chat_template_kwargs,
    } = request;
    if given.is_empty() {
        return Err(invalid(
            "messages",
            "messages is empty; at least one message is needed",
        ));
    }
    let mut messages = Vec::new();
    let system = system.map(|system| texts_of("system", system)).transpose()?;
    if let Some(content) = content(system.unwrap_or_default()) {
        messages.push(ChatMessage {
            content: Some(content),
            ..turns::new("system")
        });
    }
    for (i, message) in given.into_iter().enumerate() {
        add(&mut messages, &format!("messages[{i}]"), message)?;
    }
    let (tool_choice, parallel_tool_calls) = tool_choice.map_or(Ok((None, None)), choice)?;
    let OutputConfig { effort, format } = output_config.unwrap_or(OutputConfig {
        effort: None,
        format: None,
    });
    let thinks = thinking.as_ref().filter(|thinking| thinking.kind == "enabled");
    let thinking_token_budget = thinks.and_then(|thinking| thinking.budget_tokens);
    let include_reasoning =
        thinking.as_ref().and_then(|thinking| thinking.display.as_deref()) != Some("omitted");
    let goes_on = messages
        .last()
        .is_some_and(|last: &ChatMessage| last.role == "assistant");
    Ok(ChatRequest {
        model,
        messages,
        continue_final_message: goes_on.then_some(true),
        tools: tools.map(offered).transpose()?,
        tool_choice,
        parallel_tool_calls,
        reasoning_effort: effort,
        response_format: format.map(response_format).transpose()?,
        include_reasoning: Some(include_reasoning),
        thinking_token_budget,
        chat_template_kwargs: kwargs(chat_template_kwargs.unwrap_or_default(), thinking, reasoning)?,
        ..ChatRequest::default()
    })
}

/// Anthropic's models think when they are told to.
fn kwargs(
    mut kwargs: Map<String, Value>,
    thinking: Option<Thinking>,
    reasoning: Reasoning,
) -> Result<Option<Map<String, Value>>, ApiError> {
    let thinks = match thinking.as_ref().map(|thinking| thinking.kind.as_str()) {
        None | Some("disabled") => Some(false),
        Some("enabled") => Some(true),
        Some("adaptive") => None,
        Some(other) => {
            let text = format!("thinking.type must be enabled, disabled or adaptive, got {other:?}");
            return Err(invalid("thinking.type", text));
        }
    };
    match (thinks, reasoning) {
        (Some(true), Reasoning::None) => {
            return Err(ApiError::NotBuilt {
                param: "thinking".to_owned(),
                hint:
                    ": this model does not think before it answers (or how it writes thoughts is not known: \
                       --reasoning-parser); leave it out"
                        .to_owned(),
            });
        }
        (Some(thinks), Reasoning::Switched) => {
            kwargs.entry(ENABLE_THINKING).or_insert(json!(thinks));
        }
        _ => {}
    }
    Ok(Some(kwargs).filter(|kwargs| !kwargs.is_empty()))
}

/// Turns of one role that follow each other become one.
fn add(messages: &mut Vec<ChatMessage>, at: &str, message: InputMessage) -> Result<(), ApiError> {
    let InputMessage { role, content } = message;
    let blocks = match content {
        TextOrBlocks::Text(text) => vec![InputBlock {
            text: Some(text),
            ..block("text")
        }],
        TextOrBlocks::Blocks(blocks) => blocks,
    };
    if !["user", "assistant", "system"].contains(&role.as_str()) {
        let text = format!("{at}.role must be user or assistant, got {role:?}");
        return Err(invalid(format!("{at}.role"), text));
    }
    if blocks.is_empty() {
        return Err(invalid(format!("{at}.content"), format!("{at}.content is empty")));
    }
    for (j, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}.content[{j}]");
        match (role.as_str(), block.kind.as_str()) {
            (_, "text") => say(turn(messages, &role), needed(&at, "text", block.text)?),
            ("user", "tool_result") => messages.push(ChatMessage {
                tool_call_id: Some(needed(&at, "tool_use_id", block.tool_use_id)?),
                content: Some(result(&at, block.content, block.is_error.unwrap_or(false))?),
                ..turns::new("tool")
            }),
            ("assistant", "tool_use") => {
                let call = json!({"id": needed(&at, "id", block.id)?, "type": "function", "function": {
                    "name": needed(&at, "name", block.name)?, "arguments": needed(&at, "input", block.input)?}});
                let calls = turn(messages, &role).tool_calls.get_or_insert_with(|| json!([]));
                calls.as_array_mut().expect("made here").push(call);
            }
            ("assistant", "thinking") => {
                let thinking = needed(&at, "thinking", block.thinking)?;
                turn(messages, &role)
                    .reasoning_content
                    .get_or_insert_default()
                    .push_str(&thinking);
            }
            (_, kind @ ("tool_result" | "tool_use" | "thinking")) => {
                let text =
                    format!("{at} is of the type {kind}, which a message of the role {role} cannot have");
                return Err(invalid(format!("{at}.type"), text));
            }
            (_, kind) => {
                return Err(not_built(
                    &at,
                    kind,
                    "text, thinking, tool_use and tool_result are",
                ));
            }
        }
    }
    Ok(())
}

fn block(kind: &str) -> InputBlock {
    InputBlock {
        kind: kind.to_owned(),
        text: None,
        thinking: None,
        signature: None,
        id: None,
        name: None,
        input: None,
        tool_use_id: None,
        content: None,
        is_error: None,
    }
}

fn texts_of(at: &str, given: TextOrBlocks) -> Result<Vec<String>, ApiError> {
    let blocks = match given {
        TextOrBlocks::Text(text) => return Ok(vec![text]),
        TextOrBlocks::Blocks(blocks) => blocks,
    };
    let text = |(i, block): (usize, InputBlock)| text_of(&format!("{at}[{i}]"), &block.kind, block.text);
    blocks.into_iter().enumerate().map(text).collect()
}

fn text_of(at: &str, kind: &str, text: Option<String>) -> Result<String, ApiError> {
    match kind {
        "text" => needed(at, "text", text),
        kind => Err(not_built(at, kind, "\"text\" is")),
    }
}

/// A tool may say nothing.
/// Chat templates have no place for a result that is an error: its text says so.
fn result(at: &str, given: Option<TextOrTexts>, is_error: bool) -> Result<ChatContent, ApiError> {
    let text = |(i, TextBlock { kind, text }): (usize, TextBlock)| {
        text_of(&format!("{at}.content[{i}]"), &kind, text)
    };
    let mut texts = match given {
        None => vec![],
        Some(TextOrTexts::Text(text)) => vec![text],
        Some(TextOrTexts::Blocks(blocks)) => {
            let texts = blocks.into_iter().enumerate().map(text);
            texts.collect::<Result<_, _>>()?
        }
    };
    let first = texts.first().map_or("", |text| text.trim_start());
    let says_so = first
        .get(..5)
        .is_some_and(|word| word.eq_ignore_ascii_case("error"));
    if is_error && !says_so {
        match texts.first_mut() {
            Some(first) => first.insert_str(0, "Error: "),
            None => texts.push("Error".to_owned()),
        }
    }
    Ok(content(texts).unwrap_or(ChatContent::Text(String::new())))
}

fn offered(tools: Vec<AnthropicTool>) -> Result<Vec<Tool>, ApiError> {
    let tool = |(i, tool): (usize, AnthropicTool)| {
        let AnthropicTool {
            kind,
            name,
            description,
            input_schema,
            strict,
        } = tool;
        let at = format!("tools[{i}]");
        if let Some(kind) = kind.filter(|kind| kind != "custom") {
            return Err(not_built(&at, &kind, "\"custom\" is"));
        }
        let mut function = Map::from_iter([("name".to_owned(), json!(name))]);
        function.extend(description.map(|text| ("description".to_owned(), json!(text))));
        let schema = needed(&at, "input_schema", input_schema)?;
        function.insert("parameters".to_owned(), Value::Object(schema));
        function.extend(strict.map(|strict| ("strict".to_owned(), json!(strict))));
        Ok(Tool {
            kind: Some("function".to_owned()),
            function: Some(function),
        })
    };
    tools.into_iter().enumerate().map(tool).collect()
}

/// And whether several calls may be made.
fn choice(choice: AnthropicToolChoice) -> Result<(Option<ToolChoice>, Option<bool>), ApiError> {
    let AnthropicToolChoice {
        kind,
        name,
        disable_parallel_tool_use,
    } = choice;
    let mode = |mode: &str| ToolChoice::Mode(mode.to_owned());
    let choice = match (kind.as_str(), name) {
        ("auto", None) => mode("auto"),
        ("any", None) => mode("required"),
        ("none", None) => mode("none"),
        ("tool", Some(name)) => ToolChoice::Named(NamedChoice {
            kind: "function".to_owned(),
            function: Some(FunctionName { name }),
            allowed_tools: None,
        }),
        ("tool", None) => {
            return Err(invalid(
                "tool_choice.name",
                "tool_choice of the type tool needs the field name",
            ));
        }
        ("auto" | "any" | "none", Some(_)) => {
            let text = format!("tool_choice.name goes with the type tool, not with {kind}");
            return Err(invalid("tool_choice.name", text));
        }
        _ => {
            let text = format!("tool_choice.type must be auto, any, tool or none, got {kind:?}");
            return Err(invalid("tool_choice.type", text));
        }
    };
    Ok((Some(choice), disable_parallel_tool_use.map(|disabled| !disabled)))
}

fn response_format(OutputFormat { kind, schema }: OutputFormat) -> Result<ResponseFormat, ApiError> {
    if kind != "json_schema" {
        return Err(not_built("output_config.format", &kind, "\"json_schema\" is"));
    }
    Ok(ResponseFormat {
        kind,
        json_schema: Some(NamedSchema {
            schema,
            ..NamedSchema::default()
        }),
        ..ResponseFormat::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(mut body: Value, reasoning: Reasoning) -> Result<ChatRequest, ApiError> {
        body["model"] = json!("m");
        body["max_tokens"] = json!(2000);
        let request = serde_json::from_value(body).expect("the cases have the fields of a request");
        chat(request, reasoning)
    }

    /// Messages as chat's clients would have sent them.
    fn shown(request: &ChatRequest) -> Vec<Value> {
        let shown = request.messages.iter().map(|message| {
            let content = match &message.content {
                None => Value::Null,
                Some(ChatContent::Text(text)) => json!(text),
                Some(ChatContent::Parts(parts)) => parts.iter().map(|part| json!(part.text)).collect(),
            };
            let mut shown = json!({"role": message.role, "content": content});
            let others = [
                ("reasoning", json!(message.reasoning_content)),
                ("id", json!(message.tool_call_id)),
                ("calls", json!(message.tool_calls)),
            ];
            for (name, value) in others.into_iter().filter(|(_, value)| !value.is_null()) {
                shown[name] = value;
            }
            shown
        });
        shown.collect()
    }

    #[test]
    fn turns_become_messages() {
        let text = |text: &str| json!({"type": "text", "text": text});
        let body = json!({"system": [text("a"), text("b")], "messages": [
            {"role": "user", "content": "one"}, {"role": "user", "content": [text("two")]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, text("I look"),
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}, {"type": "tool_use", "id": "t2", "name": "g", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [text("3")]},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": true}, text("go on")]},
            {"role": "assistant", "content": "The"}]});
        let request = converted(body, Reasoning::None).unwrap();
        let call = |id: &str, name: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        assert_eq!(
            shown(&request),
            [
                json!({"role": "system", "content": ["a", "b"]}),
                json!({"role": "user", "content": ["one", "two"]}),
                json!({"role": "assistant", "content": "I look", "reasoning": "hm",
                    "calls": [call("t1", "f", json!({"x": 1})), call("t2", "g", json!({}))]}),
                json!({"role": "tool", "content": "3", "id": "t1"}),
                json!({"role": "tool", "content": "Error", "id": "t2"}),
                json!({"role": "user", "content": "go on"}),
                json!({"role": "assistant", "content": "The"}),
            ]
        );
        assert_eq!(request.continue_final_message, Some(true));
    }

    #[test]
    fn a_result_that_is_an_error_says_so() {
        let text = |text: &str| json!({"type": "text", "text": text});
        for (content, is_error, expected) in [
            (json!("no such file"), true, json!("Error: no such file")),
            (json!("no such file"), false, json!("no such file")),
            (json!("error: no such file"), true, json!("error: no such file")),
            (json!(""), true, json!("Error: ")),
            (
                json!([text("one"), text("two")]),
                true,
                json!(["Error: one", "two"]),
            ),
            (json!([]), true, json!("Error")),
        ] {
            let result =
                json!({"type": "tool_result", "tool_use_id": "1", "content": content, "is_error": is_error});
            let body = json!({"messages": [{"role": "user", "content": [result]}]});
            let request = converted(body, Reasoning::None).expect("a request");
            assert_eq!(shown(&request)[0]["content"], expected, "{content}");
        }
    }

    #[test]
    fn thinking_is_switched_where_it_can_be() {
        let of = |thinking: Value, reasoning| {
            let body = json!({"messages": [{"role": "user", "content": "a"}], "thinking": thinking});
            let kwargs = converted(body, reasoning).map(|request| json!(request.chat_template_kwargs));
            kwargs.map_err(|error| error.to_string())
        };
        let (on, off) = (
            json!({"enable_thinking": true}),
            json!({"enable_thinking": false}),
        );
        let enabled = json!({"type": "enabled", "budget_tokens": 1024});
        for (thinking, reasoning, expected) in [
            (Value::Null, Reasoning::Switched, &off),
            (json!({"type": "disabled"}), Reasoning::Switched, &off),
            (enabled.clone(), Reasoning::Switched, &on),
            (json!({"type": "adaptive"}), Reasoning::Switched, &Value::Null),
            (enabled.clone(), Reasoning::Always, &Value::Null),
            (json!({"type": "disabled"}), Reasoning::None, &Value::Null),
        ] {
            assert_eq!(
                of(thinking.clone(), reasoning).as_ref(),
                Ok(expected),
                "{thinking}"
            );
        }
        let budget = |thinking: Value| {
            let body = json!({"messages": [{"role": "user", "content": "a"}], "thinking": thinking});
            converted(body, Reasoning::Always)
                .expect("a request")
                .thinking_token_budget
        };
        assert_eq!(budget(enabled.clone()), Some(1024));
        assert_eq!(budget(json!({"type": "disabled"})), None);
        for (thinking, reasoning, part) in [
            (enabled, Reasoning::None, "thinking is not supported"),
            (
                json!({"type": "enabled", "budget_tokens": 0}),
                Reasoning::Always,
                "at least 1 ",
            ),
            (
                json!({"type": "enabled", "budget_tokens": 2000}),
                Reasoning::Always,
                "less than max_tokens, which is 2000",
            ),
            (
                json!({"type": "lots"}),
                Reasoning::Always,
                "thinking.type must be",
            ),
        ] {
            let refusal = of(thinking, reasoning).unwrap_err();
            assert!(refusal.contains(part), "{refusal}");
        }
    }

    #[test]
    fn what_cannot_be_taken_is_refused_by_place() {
        let say = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
        let with = |field: &str, value: Value| {
            let mut body = say(json!({"type": "text", "text": "a"}));
            body[field] = value;
            body
        };
        for (body, param) in [
            (
                say(json!({"type": "image", "source": {"type": "base64"}})),
                "messages[0].content[0].type",
            ),
            (
                say(json!({"type": "redacted_thinking", "data": "x"})),
                "messages[0].content[0].type",
            ),
            (
                say(json!({"type": "tool_use", "id": "a"})),
                "messages[0].content[0].type",
            ),
            (say(json!({"type": "text"})), "messages[0].content[0].text"),
            (
                say(json!({"type": "tool_result"})),
                "messages[0].content[0].tool_use_id",
            ),
            (
                say(json!({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]})),
                "messages[0].content[0].content[0].type",
            ),
            (json!({"messages": []}), "messages"),
            (
                json!({"messages": [{"role": "tool", "content": "a"}]}),
                "messages[0].role",
            ),
            (
                json!({"messages": [{"role": "user", "content": []}]}),
                "messages[0].content",
            ),
            (with("system", json!([{"type": "image"}])), "system[0].type"),
            (
                with("tools", json!([{"type": "bash_20250124", "name": "bash"}])),
                "tools[0].type",
            ),
            (with("tools", json!([{"name": "f"}])), "tools[0].input_schema"),
            (with("tool_choice", json!({"type": "tool"})), "tool_choice.name"),
            (
                with("tool_choice", json!({"type": "auto", "name": "f"})),
                "tool_choice.name",
            ),
            (
                with("tool_choice", json!({"type": "required"})),
                "tool_choice.type",
            ),
            (
                with("output_config", json!({"format": {"type": "xml"}})),
                "output_config.format.type",
            ),
        ] {
            let Err(refusal) = converted(body.clone(), Reasoning::None) else {
                panic!("{body} was taken")
            };
            assert_eq!(refusal.body().error.param.as_deref(), Some(param), "{body}");
        }
    }
}
