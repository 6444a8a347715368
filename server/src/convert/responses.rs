//! Requests of the Responses API become chat requests, which have the checks. What the two call differently is named here, so
//! that a refusal speaks of the field that was sent ([`WORDS`]). The answer is shaped in http/responses.rs.

use serde_json::{Map, Value, json};
use tandem_openapi::chat::{ChatContent, ChatMessage, ChatRequest};
use tandem_openapi::responses::{
    InputItem, InputTokensRequest, ItemContent, ItemPart, ResponsesFormat, ResponsesInput,
    ResponsesNamedChoice, ResponsesNamedTool, ResponsesReasoning, ResponsesRequest, ResponsesText,
    ResponsesTool, ResponsesToolChoice,
};
use tandem_openapi::structured::{NamedSchema, ResponseFormat};
use tandem_openapi::tools::{AllowedTools, FunctionName, NamedChoice, NamedTool, Tool, ToolChoice};

use super::turns::{self, content, needed, not_built, say, turn};
use crate::error::{ApiError, invalid};
use crate::id;

/// A field of chat's, and what it is here.
pub const WORDS: &[(&str, &str)] = &[
    ("].function.", "]."),
    ("tool_choice.function.name", "tool_choice.name"),
    ("tool_choice.allowed_tools.", "tool_choice."),
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("max_tokens", "max_output_tokens"),
];

const LOGPROBS: &str = "message.output_text.logprobs";
/// What other servers add to items that no answer here has, or, of the last, what is in the open here.
const NOTHING_TO_INCLUDE: [&str; 7] = [
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
    "reasoning.encrypted_content",
];
const ROLES: [&str; 4] = ["user", "assistant", "system", "developer"];
const NO_SUMMARIES: &str =
    ": nothing here makes summaries, the reasoning itself is in the output; leave it out, or send auto";

/// OpenAI's limits.
const MAX_METADATA: usize = 16;
const MAX_KEY_CHARS: usize = 64;
const MAX_VALUE_CHARS: usize = 512;

/// `earlier`: the items of the responses that this one goes on with. `items`: those of this request's own input.
pub fn chat(
    request: &ResponsesRequest,
    earlier: Vec<InputItem>,
    items: Vec<InputItem>,
) -> Result<ChatRequest, ApiError> {
    let request = request.clone();
    if request.background == Some(true) {
        return Err(ApiError::NotBuilt {
            param: "background".to_owned(),
            hint: ": send the request without it, or with stream".to_owned(),
        });
    }
    match request.truncation.as_deref() {
        None | Some("disabled") => {}
        Some("auto") => {
            return Err(ApiError::NotBuilt {
                param: "truncation".to_owned(),
                hint: ": it is auto, only disabled is built; send an input that fits the context".to_owned(),
            });
        }
        Some(other) => {
            let text = format!("truncation must be auto or disabled, got {other:?}");
            return Err(invalid("truncation", text));
        }
    }
    check_metadata(&request)?;
    let mut logprobs = false;
    for (i, wanted) in request.include.iter().flatten().enumerate() {
        match wanted.as_str() {
            LOGPROBS => logprobs = true,
            known if NOTHING_TO_INCLUDE.contains(&known) => {}
            other => {
                let text = format!("include[{i}] is {other:?}, which is nothing that can be included");
                return Err(invalid(format!("include[{i}]"), text));
            }
        }
    }
    if request.top_logprobs.is_some_and(|top| top > 0) && !logprobs {
        let text = format!("top_logprobs needs {LOGPROBS:?} in include");
        return Err(invalid("top_logprobs", text));
    }
    let prompt = InputTokensRequest {
        model: request.model,
        input: ResponsesInput::Items(Vec::new()),
        instructions: request.instructions,
        previous_response_id: None,
        tools: request.tools,
        tool_choice: request.tool_choice,
        parallel_tool_calls: request.parallel_tool_calls,
        text: request.text,
        reasoning: request.reasoning,
        chat_template_kwargs: request.chat_template_kwargs,
    };
    Ok(ChatRequest {
        max_tokens: request.max_output_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        seed: request.seed,
        stop: request.stop,
        stream: request.stream,
        logprobs: Some(logprobs),
        top_logprobs: request.top_logprobs.filter(|_| logprobs),
        ..prompt_of(prompt, earlier, items)?
    })
}

/// A chat request with all that its prompt is made of.
pub fn prompt_of(
    request: InputTokensRequest,
    earlier: Vec<InputItem>,
    items: Vec<InputItem>,
) -> Result<ChatRequest, ApiError> {
    let InputTokensRequest {
        model,
        input: _,
        instructions,
        previous_response_id: _,
        tools,
        tool_choice,
        parallel_tool_calls,
        text,
        reasoning,
        chat_template_kwargs,
    } = request;
    let mut messages = Vec::new();
    if let Some(text) = instructions {
        say(turn(&mut messages, "system"), text);
    }
    for (i, item) in earlier.into_iter().enumerate() {
        add(&mut messages, &format!("previous_response_id[{i}]"), item)?;
    }
    for (i, item) in items.into_iter().enumerate() {
        add(&mut messages, &format!("input[{i}]"), item)?;
    }
    let ResponsesReasoning { effort, summary } = reasoning.unwrap_or_default();
    if summary.is_some_and(|summary| summary != "auto") {
        return Err(ApiError::NotBuilt {
            param: "reasoning.summary".to_owned(),
            hint: NO_SUMMARIES.to_owned(),
        });
    }
    let ResponsesText { format } = text.unwrap_or_default();
    Ok(ChatRequest {
        model,
        messages,
        tools: tools.map(offered).transpose()?,
        tool_choice: tool_choice.map(choice).transpose()?,
        parallel_tool_calls,
        reasoning_effort: effort,
        response_format: format.map(response_format).transpose()?.flatten(),
        chat_template_kwargs,
        ..ChatRequest::default()
    })
}

fn check_metadata(request: &ResponsesRequest) -> Result<(), ApiError> {
    for (param, text) in [
        ("user", &request.user),
        ("safety_identifier", &request.safety_identifier),
        ("prompt_cache_key", &request.prompt_cache_key),
    ] {
        let chars = text.as_ref().map_or(0, |text| text.chars().count());
        if chars > MAX_VALUE_CHARS {
            let text = format!("{param} has {chars} characters, at most {MAX_VALUE_CHARS} are kept");
            return Err(invalid(param, text));
        }
    }
    let metadata = request.metadata.iter().flatten();
    let is_long = |(key, value): (&String, &String)| {
        key.chars().count() > MAX_KEY_CHARS || value.chars().count() > MAX_VALUE_CHARS
    };
    if metadata.clone().count() > MAX_METADATA || metadata.clone().any(is_long) {
        let text = format!(
            "metadata has at most {MAX_METADATA} keys of {MAX_KEY_CHARS} characters, with values of {MAX_VALUE_CHARS}"
        );
        return Err(invalid("metadata", text));
    }
    Ok(())
}

/// The items of an input.
pub fn items(input: ResponsesInput) -> Result<Vec<InputItem>, ApiError> {
    match input {
        ResponsesInput::Text(text) => Ok(vec![InputItem {
            kind: Some("message".to_owned()),
            role: Some("user".to_owned()),
            content: Some(ItemContent::Text(text)),
            ..InputItem::default()
        }]),
        ResponsesInput::Items(items) if items.is_empty() => {
            Err(invalid("input", "input is empty; at least one item is needed"))
        }
        ResponsesInput::Items(items) => Ok(items),
    }
}

/// As it is kept, and listed.
pub fn kept(item: &InputItem) -> Value {
    let parts = |kind: &str, content: &Option<ItemContent>| match content {
        None => json!([]),
        Some(ItemContent::Text(text)) => json!([{"type": kind, "text": text}]),
        Some(ItemContent::Parts(parts)) => parts.iter().map(kept_part).collect(),
    };
    let named = |prefix: &str| item.id.clone().unwrap_or_else(|| id::fresh(prefix));
    let status = item.status.as_deref().unwrap_or("completed");
    match kind_of(item) {
        "function_call" => {
            json!({"type": "function_call", "id": named("fc_"), "call_id": item.call_id, "name": item.name,
            "arguments": item.arguments, "status": status})
        }
        "function_call_output" => {
            let output = match &item.output {
                Some(ItemContent::Text(text)) => json!(text),
                output => parts("input_text", output),
            };
            json!({"type": "function_call_output", "id": named("fco_"), "call_id": item.call_id, "output": output,
                "status": status})
        }
        "reasoning" => {
            let summary: Value = item.summary.iter().flatten().map(kept_part).collect();
            json!({"type": "reasoning", "id": named("rs_"), "summary": summary,
                "content": parts("reasoning_text", &item.content), "status": status})
        }
        _ => {
            let kind = match item.role.as_deref() {
                Some("assistant") => "output_text",
                _ => "input_text",
            };
            json!({"type": "message", "id": named("msg_"), "role": item.role, "content": parts(kind, &item.content),
                "status": status})
        }
    }
}

fn kept_part(part: &ItemPart) -> Value {
    let ItemPart { kind, text, refusal } = part;
    match (kind.as_str(), refusal) {
        ("refusal", Some(refusal)) => json!({"type": kind, "refusal": refusal}),
        ("output_text", _) => json!({"type": kind, "text": text, "annotations": []}),
        _ => json!({"type": kind, "text": text}),
    }
}

fn kind_of(item: &InputItem) -> &str {
    item.kind.as_deref().unwrap_or("message")
}

fn add(messages: &mut Vec<ChatMessage>, at: &str, item: InputItem) -> Result<(), ApiError> {
    let kind = kind_of(&item).to_owned();
    let InputItem {
        role,
        content: given,
        call_id,
        name,
        arguments,
        output,
        summary,
        ..
    } = item;
    match kind.as_str() {
        "message" => {
            let role = needed(at, "role", role)?;
            if !ROLES.contains(&role.as_str()) {
                let text = format!("{at}.role must be one of {}, got {role:?}", ROLES.join(", "));
                return Err(invalid(format!("{at}.role"), text));
            }
            let texts = texts(&format!("{at}.content"), needed(at, "content", given)?)?;
            // What the assistant thought or called stands in items of their own, beside its message.
            let begun = messages
                .last()
                .is_some_and(|last| last.role == "assistant" && last.content.is_none());
            if !(begun && role == "assistant") {
                messages.push(turns::new(&role));
            }
            let message = messages.last_mut().expect("just pushed");
            message.content = Some(content(texts).unwrap_or(ChatContent::Text(String::new())));
        }
        "function_call" => {
            let arguments = needed(at, "arguments", arguments)?;
            let is_object =
                arguments.trim().is_empty() || serde_json::from_str::<Map<String, Value>>(&arguments).is_ok();
            if !is_object {
                let text = format!("{at}.arguments must be a text of a JSON object");
                return Err(invalid(format!("{at}.arguments"), text));
            }
            let call = json!({"id": needed(at, "call_id", call_id)?, "type": "function", "function": {
                "name": needed(at, "name", name)?, "arguments": arguments}});
            let calls = turn(messages, "assistant")
                .tool_calls
                .get_or_insert_with(|| json!([]));
            calls.as_array_mut().expect("made here").push(call);
        }
        "function_call_output" => {
            let texts = texts(&format!("{at}.output"), needed(at, "output", output)?)?;
            messages.push(ChatMessage {
                tool_call_id: Some(needed(at, "call_id", call_id)?),
                content: Some(content(texts).unwrap_or(ChatContent::Text(String::new()))),
                ..turns::new("tool")
            });
        }
        "reasoning" => {
            let said = given.map_or(Ok(Vec::new()), |given| texts(&format!("{at}.content"), given))?;
            let summed = summary.map(ItemContent::Parts);
            let summed = summed.map_or(Ok(Vec::new()), |parts| texts(&format!("{at}.summary"), parts))?;
            // The whole is better than what it comes to. Of what others encrypted nothing is known.
            let text = if said.is_empty() { summed } else { said }.join("\n");
            if !text.is_empty() {
                // It belongs to what follows, not to the turn before.
                if messages.last().is_none_or(|last| {
                    last.role != "assistant" || last.content.is_some() || last.tool_calls.is_some()
                }) {
                    messages.push(turns::new("assistant"));
                }
                let message = messages.last_mut().expect("just pushed");
                message.reasoning_content.get_or_insert_default().push_str(&text);
            }
        }
        kind => {
            let built = "message, function_call, function_call_output and reasoning are";
            return Err(not_built(at, kind, built));
        }
    }
    Ok(())
}

fn texts(at: &str, given: ItemContent) -> Result<Vec<String>, ApiError> {
    let parts = match given {
        ItemContent::Text(text) => return Ok(vec![text]),
        ItemContent::Parts(parts) => parts,
    };
    let text = |(i, ItemPart { kind, text, refusal }): (usize, ItemPart)| {
        let at = format!("{at}[{i}]");
        match kind.as_str() {
            "input_text" | "output_text" | "text" | "reasoning_text" | "summary_text" => {
                needed(&at, "text", text)
            }
            "refusal" => needed(&at, "refusal", refusal),
            kind => Err(not_built(&at, kind, "parts of text are")),
        }
    };
    parts.into_iter().enumerate().map(text).collect()
}

fn offered(tools: Vec<ResponsesTool>) -> Result<Vec<Tool>, ApiError> {
    let tool = |(i, tool): (usize, ResponsesTool)| {
        let ResponsesTool {
            kind,
            name,
            description,
            parameters,
            strict,
        } = tool;
        let at = format!("tools[{i}]");
        if kind != "function" {
            return Err(not_built(&at, &kind, "\"function\" is"));
        }
        let mut function = Map::from_iter([("name".to_owned(), json!(needed(&at, "name", name)?))]);
        function.extend(description.map(|text| ("description".to_owned(), json!(text))));
        function.extend(parameters.map(|schema| ("parameters".to_owned(), Value::Object(schema))));
        function.extend(strict.map(|strict| ("strict".to_owned(), json!(strict))));
        Ok(Tool {
            kind: Some(kind),
            function: Some(function),
        })
    };
    tools.into_iter().enumerate().map(tool).collect()
}

fn choice(choice: ResponsesToolChoice) -> Result<ToolChoice, ApiError> {
    let ResponsesNamedChoice {
        kind,
        name,
        mode,
        tools,
    } = match choice {
        ResponsesToolChoice::Mode(mode) => return Ok(ToolChoice::Mode(mode)),
        ResponsesToolChoice::Named(named) => named,
    };
    let at = "tool_choice";
    let (function, allowed_tools) = match kind.as_str() {
        "function" => {
            let name = needed(at, "name", name)?;
            (Some(FunctionName { name }), None)
        }
        "allowed_tools" => {
            let tool = |ResponsesNamedTool { kind, name }| NamedTool {
                kind,
                function: name.map(|name| FunctionName { name }),
            };
            let tools = needed(at, "tools", tools)?.into_iter().map(tool).collect();
            let mode = needed(at, "mode", mode)?;
            (None, Some(AllowedTools { mode, tools }))
        }
        kind => return Err(not_built(at, kind, "\"function\" and \"allowed_tools\" are")),
    };
    Ok(ToolChoice::Named(NamedChoice {
        kind,
        function,
        allowed_tools,
    }))
}

/// `None`: any text.
fn response_format(format: ResponsesFormat) -> Result<Option<ResponseFormat>, ApiError> {
    let ResponsesFormat {
        kind,
        name,
        description,
        schema,
        strict,
    } = format;
    let json_schema = match kind.as_str() {
        "text" => return Ok(None),
        "json_object" => None,
        "json_schema" => Some(NamedSchema {
            name,
            description,
            schema,
            strict,
        }),
        _ => {
            let text = format!("text.format.type must be text, json_object or json_schema, got {kind:?}");
            return Err(invalid("text.format.type", text));
        }
    };
    Ok(Some(ResponseFormat {
        kind,
        json_schema,
        ..ResponseFormat::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(earlier: Value, input: Value) -> Result<Vec<Value>, ApiError> {
        let request = json!({"model": "m", "input": input, "instructions": "Be brief."});
        let request: ResponsesRequest =
            serde_json::from_value(request).expect("the cases have the fields of a request");
        let earlier = serde_json::from_value(earlier).expect("items");
        let items = items(request.input.clone())?;
        let chat = chat(&request, earlier, items)?;
        let shown = chat.messages.into_iter().map(|message| {
            let content = match message.content {
                None => Value::Null,
                Some(ChatContent::Text(text)) => json!(text),
                Some(ChatContent::Parts(parts)) => parts.into_iter().map(|part| json!(part.text)).collect(),
            };
            let calls = message.tool_calls.unwrap_or_default();
            json!([
                message.role,
                content,
                message.reasoning_content,
                message.tool_call_id,
                calls
            ])
        });
        Ok(shown.collect())
    }

    #[test]
    fn items_become_messages() {
        let text = |kind: &str, text: &str| json!({"type": kind, "text": text, "annotations": []});
        let earlier = json!([
            {"type": "message", "id": "msg_1", "role": "user", "content": [text("input_text", "one")]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [text("reasoning_text", "hm")], "encrypted_content": null},
            {"type": "message", "role": "assistant", "content": [text("output_text", "I look")], "status": "completed"},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{\"x\": 1}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": ""},
        ]);
        let input = json!([
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"type": "function_call_output", "call_id": "c2", "output": [text("input_text", "4")]},
            {"role": "assistant", "content": "So"},
            {"role": "assistant", "content": "it is."},
            {"role": "developer", "content": [text("input_text", "a"), text("input_text", "b")]},
        ]);
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let calls = json!([call("c1", "f", "{\"x\": 1}"), call("c2", "g", "")]);
        let expected = [
            json!(["system", "Be brief.", null, null, null]),
            json!(["user", "one", null, null, null]),
            json!(["assistant", "I look", "hm", null, calls]),
            json!(["tool", "3", null, "c1", null]),
            json!(["tool", "4", null, "c2", null]),
            json!(["assistant", "So", null, null, null]),
            json!(["assistant", "it is.", null, null, null]),
            json!(["developer", ["a", "b"], null, null, null]),
        ];
        assert_eq!(messages(earlier, input).unwrap(), expected);
        let plain = messages(json!([]), json!("two")).unwrap();
        assert_eq!(plain[1], json!(["user", "two", null, null, null]));
    }

    #[test]
    fn what_is_kept_is_what_was_sent_and_can_be_sent_again() {
        let input = json!([
            {"role": "user", "content": "one"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        ]);
        let read = |value: &Value| serde_json::from_value::<Vec<InputItem>>(value.clone()).expect("items");
        let kept: Value = read(&input).iter().map(kept).collect();
        for (i, prefix) in ["msg_", "rs_", "fc_", "fco_", "msg_"].into_iter().enumerate() {
            assert!(
                kept[i]["id"].as_str().is_some_and(|id| id.starts_with(prefix)),
                "{kept}"
            );
        }
        let nothing = json!([]);
        assert_eq!(
            messages(nothing.clone(), kept.clone()).unwrap(),
            messages(nothing, input).unwrap()
        );
        let again: Value = read(&kept).iter().map(super::kept).collect();
        assert_eq!(again, kept);
    }

    #[test]
    fn what_cannot_be_taken_is_refused_by_place() {
        for (input, param) in [
            (json!([]), "input"),
            (json!([{"content": "a"}]), "input[0].role"),
            (json!([{"role": "tool", "content": "a"}]), "input[0].role"),
            (json!([{"role": "user"}]), "input[0].content"),
            (
                json!([{"role": "user", "content": [{"type": "input_file"}]}]),
                "input[0].content[0].type",
            ),
            (
                json!([{"type": "function_call", "name": "f", "arguments": "{}"}]),
                "input[0].call_id",
            ),
            (
                json!([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}]),
                "input[0].arguments",
            ),
            (
                json!([{"type": "function_call_output", "call_id": "c"}]),
                "input[0].output",
            ),
            (json!([{"type": "web_search_call"}]), "input[0].type"),
        ] {
            let Err(refusal) = messages(json!([]), input.clone()) else {
                panic!("{input} was taken")
            };
            assert_eq!(refusal.body().error.param.as_deref(), Some(param), "{input}");
        }
    }
}
