//! Messages of a chat, put together from what other APIs have in their place. Not here: those APIs.

use tandem_openapi::chat::{ChatContent, ChatMessage, ChatPart};

use crate::error::{ApiError, invalid};

pub fn new(role: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        ..ChatMessage::default()
    }
}

/// The last message, if it is of this role, or a new one.
pub fn turn<'m>(messages: &'m mut Vec<ChatMessage>, role: &str) -> &'m mut ChatMessage {
    if messages.last().is_none_or(|last| last.role != role) {
        messages.push(new(role));
    }
    messages.last_mut().expect("just pushed")
}

/// One text is a text to the chat template, several are parts.
pub fn say(message: &mut ChatMessage, text: String) {
    let part = |text| ChatPart {
        kind: "text".to_owned(),
        text: Some(text),
    };
    message.content = Some(match message.content.take() {
        None => ChatContent::Text(text),
        Some(ChatContent::Text(first)) => ChatContent::Parts(vec![part(first), part(text)]),
        Some(ChatContent::Parts(mut parts)) => {
            parts.push(part(text));
            ChatContent::Parts(parts)
        }
    });
}

/// `None`: there is no text.
pub fn content(texts: Vec<String>) -> Option<ChatContent> {
    let mut message = ChatMessage::default();
    texts.into_iter().for_each(|text| say(&mut message, text));
    message.content
}

pub fn needed<T>(at: &str, field: &str, value: Option<T>) -> Result<T, ApiError> {
    value.ok_or_else(|| invalid(format!("{at}.{field}"), format!("{at} needs the field {field}")))
}

/// `built` goes on: `only text and tools are built`.
pub fn not_built(at: &str, kind: &str, built: &str) -> ApiError {
    let kind: String = kind.chars().take(40).collect();
    ApiError::NotBuilt {
        param: format!("{at}.type"),
        hint: format!(": it is {kind:?}, only {built} built"),
    }
}
