//! What is known of fields that no body of this server has, but clients and other servers do: those that change nothing
//! here, and those that would change the answer, which are refused with what to use instead. A field that is in no list
//! is compared with the names of the document, and then logged (fields.rs).

use crate::extract::Body;
use crate::fields::{Given, Kind, Rule};

/// The document's name of a type is the type's own.
macro_rules! bodies {
    ($($module:ident::$name:ident: $rules:expr;)*) => {
        $(impl Body for tandem_openapi::$module::$name {
            const SCHEMA: &'static str = stringify!($name);
            const RULES: Option<&'static [&'static [Rule]]> = $rules;
        })*
    };
}

bodies! {
    chat::ChatRequest: Some(&[EVERYWHERE, SAMPLING, MESSAGES, CHAT]);
    completions::CompletionRequest: Some(&[EVERYWHERE, SAMPLING, COMPLETIONS]);
    messages::MessagesRequest: Some(&[ANTHROPIC, EVERYWHERE, SAMPLING, ORDER]);
    messages::CountTokensRequest: Some(&[ANTHROPIC, COUNT, EVERYWHERE]);
    embeddings::EmbeddingRequest: Some(&[EVERYWHERE, EMBEDDINGS]);
    scores::ScoreRequest: Some(&[EVERYWHERE, EMBEDDINGS]);
    scores::RerankRequest: Some(&[EVERYWHERE, EMBEDDINGS]);
    responses::ResponsesRequest: Some(&[RESPONSES, EVERYWHERE, SAMPLING, ORDER]);
    responses::InputTokensRequest: Some(&[RESPONSES, EVERYWHERE]);
    generate::GenerateRequest: Some(&[GENERATE, EVERYWHERE]);
    batches::CreateBatch: Some(&[EVERYWHERE]);
    uploads::CreateUpload: Some(&[EVERYWHERE]);
    uploads::CompleteUpload: Some(&[EVERYWHERE]);
    tokenize::TokenizeRequest: Some(&[EVERYWHERE, MESSAGES, TOKENIZE]);
    tokenize::DetokenizeRequest: Some(&[EVERYWHERE]);
    adapters::LoadLoraAdapter: Some(&[EVERYWHERE, LORA]);
    adapters::UnloadLoraAdapter: Some(&[EVERYWHERE, LORA]);
    adapters::MergeAdapter: Some(&[EVERYWHERE]);
    // Settings of training have a table of their own, with every spelling.
    fine_tuning::CreateJob: None;
    fine_tunes::CreateFineTune: None;
    // Tinker's: its SDK knows their fields, and what a later one adds is logged.
    tinker::ClientConfigRequest: Some(&[]);
    tinker::CreateSessionRequest: Some(&[]);
    tinker::SessionHeartbeatRequest: Some(&[]);
    tinker::FinishSessionRequest: Some(&[]);
    tinker::RetrieveFutureRequest: Some(&[]);
    tinker::CreateModelRequest: Some(&[]);
    tinker::GetInfoRequest: Some(&[]);
    tinker::OptimStepRequest: Some(&[]);
    tinker::SaveWeightsRequest: Some(&[]);
    tinker::SaveWeightsForSamplerRequest: Some(&[]);
    tinker::LoadWeightsRequest: Some(&[]);
    tinker::CreateSamplingSessionRequest: Some(&[]);
    tinker::SampleRequest: Some(&[]);
    tinker::TelemetryRequest: Some(&[]);
    tinker::TtlRequest: Some(&[]);
    tinker::WeightsInfoRequest: Some(&[]);
}

const fn harmless(field: &'static str) -> Rule {
    Rule {
        field,
        kind: Kind::Harmless,
    }
}

const fn refused(field: &'static str, neutral: fn(&Given) -> bool, instead: &'static str) -> Rule {
    Rule {
        field,
        kind: Kind::Refused { neutral, instead },
    }
}

fn never(_: &Given) -> bool {
    false
}

/// `false`, 0, and the empty text, list or object.
fn nothing(value: &Given) -> bool {
    match value {
        Given::Null | Given::Bool(false) | Given::Empty => true,
        Given::Number(number) => *number == 0.0,
        Given::Text(text) => text.is_empty(),
        Given::Bool(true) | Given::Filled | Given::Tagged(_) => false,
    }
}

fn no(value: &Given) -> bool {
    *value == Given::Bool(false)
}

fn yes(value: &Given) -> bool {
    *value == Given::Bool(true)
}

fn one(value: &Given) -> bool {
    *value == Given::Number(1.0)
}

/// 1 is off, and 0 (llama.cpp).
fn one_or_nothing(value: &Given) -> bool {
    one(value) || nothing(value)
}

/// Off in llama.cpp is -1 or 0.
fn off(value: &Given) -> bool {
    nothing(value) || *value == Given::Number(-1.0)
}

/// Anthropic's way to say no.
fn disabled(value: &Given) -> bool {
    nothing(value) || matches!(value, Given::Tagged(kind) if kind == "disabled")
}

fn plain(value: &Given) -> bool {
    matches!(value, Given::Text(text) if text == "text" || text == "message")
}

fn standard(value: &Given) -> bool {
    matches!(value, Given::Text(text) if text == "standard")
}

fn auto(value: &Given) -> bool {
    matches!(value, Given::Text(text) if text == "auto")
}

fn medium(value: &Given) -> bool {
    matches!(value, Given::Text(text) if text == "medium")
}

const MODEL: &str = "name the adapter as model; GET /v1/models lists the names";
const LOAD: &str = "load the adapter with POST /v1/load_lora_adapter, then name it as model";
const MAX_TOKENS: &str = "use max_tokens";
const RESPONSE_FORMAT: &str = "use response_format";
const STRUCTURED: &str = "use structured_outputs, which has json, regex, choice, grammar and structural_tag";
const CONVERSATION: &str = "use POST /v1/chat/completions";
const NO_SOUND: &str = "only text is understood";
const FORMS: &str = "offer a tool and choose it, or use POST /v1/chat/completions";
const SCALE: &str = "scale lora_alpha in the adapter's adapter_config.json";
const FUNCTION: &str = "name, description and parameters stand in the tool's function";
const HERE: &str = "put its fields into the body itself";

const EVERYWHERE: &[Rule] = &[
    // Who asks and why, for the sender's own books.
    harmless("user"),
    harmless("user_id"),
    harmless("metadata"),
    harmless("safety_identifier"),
    harmless("request_id"),
    harmless("session_id"),
    harmless("rid"),
    harmless("trace"),
    // There is one tier.
    harmless("service_tier"),
    // text-generation-webui's way to render a chat; the template decides it here.
    harmless("mode"),
    // Settings of clients, which some send along.
    harmless("timeout"),
    harmless("max_retries"),
    refused("extra_body", nothing, HERE),
    refused("extra_headers", nothing, "send them as HTTP headers"),
    refused("extra_query", nothing, "put them into the URL"),
];

const SAMPLING: &[Rule] = &[
    // The prefix cache is always on, finds what it can by itself, and never changes an answer.
    harmless("prompt_cache_key"),
    harmless("prompt_cache_retention"),
    harmless("prompt_cache_options"),
    harmless("cache_prompt"),
    harmless("id_slot"),
    // When a model is unloaded.
    harmless("keep_alive"),
    // What a chunk of a stream is padded with, or how many tokens are in one.
    harmless("stream_options.include_obfuscation"),
    harmless("stream_interval"),
    refused("store", nothing, "POST /v1/responses keeps its answers"),
    // Which model.
    refused("adapter_id", nothing, MODEL),
    refused("adapter", nothing, MODEL),
    refused("adapters", nothing, MODEL),
    refused("adapter_name", nothing, MODEL),
    refused("lora", nothing, MODEL),
    refused("lora_name", nothing, MODEL),
    refused("lora_id", nothing, MODEL),
    refused("lora_adapter", nothing, MODEL),
    refused("lora_adapters", nothing, MODEL),
    refused("lora_request", nothing, LOAD),
    refused("lora_path", nothing, LOAD),
    refused("adapter_path", nothing, LOAD),
    refused("adapter_source", nothing, LOAD),
    refused(
        "merged_adapters",
        nothing,
        "load a merged adapter and name it as model",
    ),
    refused("api_token", nothing, LOAD),
    refused("engine", nothing, "use model"),
    refused("model_id", nothing, "use model"),
    refused("model_name", nothing, "use model"),
    refused("models", nothing, "name one as model"),
    // How long.
    refused("max_new_tokens", never, MAX_TOKENS),
    refused("max_length", never, MAX_TOKENS),
    refused("max_gen_len", never, MAX_TOKENS),
    refused("max_output_tokens", never, MAX_TOKENS),
    refused("max_tokens_to_sample", never, MAX_TOKENS),
    refused("n_predict", off, MAX_TOKENS),
    refused("num_predict", off, MAX_TOKENS),
    refused("min_new_tokens", nothing, "use min_tokens"),
    refused("min_length", nothing, "use min_tokens"),
    refused("stop_sequences", nothing, "use stop"),
    refused("stop_strings", nothing, "use stop"),
    refused("stop_words", nothing, "use stop"),
    refused("stop_regex", nothing, "use stop"),
    refused("eos_token_id", never, "use stop_token_ids"),
    refused("no_stop_trim", nothing, "use include_stop_str_in_output"),
    refused("truncate", nothing, "send a prompt that fits the context"),
    refused(
        "truncate_prompt_tokens",
        never,
        "send a prompt that fits the context",
    ),
    refused("truncation_side", nothing, "send a prompt that fits the context"),
    refused("num_ctx", nothing, "the context is set at start: --max-model-len"),
    refused("n_ctx", nothing, "the context is set at start: --max-model-len"),
    refused("n_keep", nothing, "send a prompt that fits the context"),
    // Which answers are possible.
    refused("format", nothing, RESPONSE_FORMAT),
    refused("response_schema", never, RESPONSE_FORMAT),
    refused("output_schema", never, RESPONSE_FORMAT),
    refused("guided_schema", never, RESPONSE_FORMAT),
    refused("guided_json_object", nothing, RESPONSE_FORMAT),
    refused("json", nothing, RESPONSE_FORMAT),
    refused("ebnf", nothing, STRUCTURED),
    refused("grammar_string", nothing, STRUCTURED),
    refused("regex", nothing, STRUCTURED),
    refused("choice", nothing, STRUCTURED),
    refused("structural_tag", nothing, STRUCTURED),
    // There is one, which honours or refuses.
    harmless("guided_decoding_backend"),
    refused(
        "structured_outputs.disable_additional_properties",
        nothing,
        "write additionalProperties: false into the schema",
    ),
    refused("allowed_token_ids", nothing, "use logit_bias"),
    refused("bad_words", nothing, "use logit_bias"),
    refused("bad_words_ids", nothing, "use logit_bias"),
    refused("suppress_tokens", nothing, "use logit_bias"),
    refused("begin_suppress_tokens", nothing, "use logit_bias"),
    refused("logits_processors", nothing, ""),
    refused("logit_processors", nothing, ""),
    refused("custom_logit_processor", nothing, ""),
    refused("custom_params", nothing, ""),
    // How a token is chosen.
    refused("temp", never, "use temperature"),
    refused("do_sample", yes, "use temperature; 0 is greedy"),
    refused("random_seed", never, "use seed"),
    refused("sampling_seed", never, "use seed"),
    refused("repeat_penalty", one_or_nothing, "use repetition_penalty"),
    refused(
        "repeat_last_n",
        off,
        "repetition_penalty looks at the whole prompt and answer",
    ),
    refused("no_repeat_ngram_size", nothing, "use repetition_penalty"),
    refused(
        "encoder_repetition_penalty",
        one_or_nothing,
        "use repetition_penalty",
    ),
    refused("repetition_detection", never, ""),
    refused("length_penalty", one, ""),
    refused("typical_p", one_or_nothing, "use top_p or min_p"),
    refused("typ_p", one_or_nothing, "use top_p or min_p"),
    refused("top_a", nothing, "use top_p or min_p"),
    refused("top_n_sigma", off, "use top_p or min_p"),
    refused("tfs", one_or_nothing, "use top_p or min_p"),
    refused("tfs_z", one_or_nothing, "use top_p or min_p"),
    refused("eta_cutoff", nothing, "use top_p or min_p"),
    refused("epsilon_cutoff", nothing, "use top_p or min_p"),
    refused("mirostat", nothing, "use top_p or min_p"),
    refused("mirostat_mode", nothing, "use top_p or min_p"),
    refused("xtc_probability", nothing, "use top_p or min_p"),
    refused("dry_multiplier", nothing, "use repetition_penalty"),
    refused("dynatemp_range", nothing, "use temperature"),
    refused("dynamic_temperature", nothing, "use temperature"),
    refused("smoothing_factor", nothing, "use temperature"),
    refused("guidance_scale", one_or_nothing, ""),
    refused("negative_prompt", nothing, ""),
    refused("ban_eos_token", nothing, "use ignore_eos"),
    refused("banned_strings", nothing, "use logit_bias"),
    refused("penalty_alpha", nothing, ""),
    refused("watermark", nothing, ""),
    refused("use_beam_search", no, ""),
    refused("num_beams", one_or_nothing, ""),
    refused("early_stopping", nothing, ""),
    refused("num_return_sequences", one, "use n"),
    // Where the sampler that these tune is off, they change nothing.
    harmless("mirostat_tau"),
    harmless("mirostat_eta"),
    harmless("dry_base"),
    harmless("dry_allowed_length"),
    harmless("dry_penalty_last_n"),
    harmless("dry_sequence_breakers"),
    harmless("dynatemp_exponent"),
    harmless("smoothing_curve"),
    harmless("xtc_threshold"),
    // What comes back.
    refused("decoder_input_details", nothing, "use prompt_logprobs"),
    refused("details", nothing, "use logprobs"),
    refused("n_probs", nothing, "use logprobs"),
    refused("top_n_tokens", nothing, "use logprobs"),
    refused("logprob_token_ids", nothing, ""),
    refused("return_tokens_as_token_ids", no, "use return_token_ids"),
    refused("return_tokens", nothing, "use return_token_ids"),
    refused("return_hidden_states", nothing, ""),
    refused("spaces_between_special_tokens", yes, ""),
    // How it is served.
    refused("kv_transfer_params", nothing, ""),
    refused("vllm_xargs", nothing, HERE),
    // Where other servers have all of it.
    refused("parameters", nothing, HERE),
    refused("options", nothing, HERE),
    refused("sampling_params", nothing, HERE),
    refused("generation_config", nothing, HERE),
];

/// What chat and completions have.
const ORDER: &[Rule] = &[
    refused("cache_salt", never, "POST /v1/chat/completions has it"),
    refused("priority", nothing, "POST /v1/chat/completions has it"),
];

/// Of vLLM, text-embeddings-inference and hosted services.
const EMBEDDINGS: &[Rule] = &[
    refused("adapter_id", nothing, MODEL),
    refused("lora_path", nothing, LOAD),
    refused("inputs", never, "use input"),
    refused("texts", never, "use input"),
    refused(
        "messages",
        never,
        "send the rendered text, or its token ids, as input",
    ),
    refused("truncate", nothing, "send texts that fit the context"),
    refused("truncate_prompt_tokens", never, "send texts that fit the context"),
    refused("truncation_direction", nothing, "send texts that fit the context"),
    refused("input_type", nothing, "put the instruction into the text"),
    refused("task", nothing, "put the instruction into the text"),
    refused("prompt_name", nothing, "put the prompt into the text"),
    refused("pooling_type", never, "use pooling"),
    refused("use_activation", never, "use normalize"),
    refused("embd_normalize", never, "use normalize"),
    refused("embed_dtype", never, "vectors are float32"),
    refused("output_dtype", never, "vectors are float32"),
];

const MESSAGES: &[Rule] = &[
    // What a message had when the server said it, and clients send back.
    refused("messages[].refusal", nothing, "put it into content"),
    // Rows of training have it.
    refused("messages[].weight", one, "leave it out: a request weighs nothing"),
    refused("messages[].annotations", nothing, "put it into content"),
    refused("messages[].audio", nothing, "only text is understood"),
    // Ollama's, beside content.
    refused("messages[].images", nothing, "only text is understood"),
    // lm-eval says of every message that it is a text.
    refused("messages[].type", plain, "only messages of text are understood"),
    // The prefix cache needs no hints.
    harmless("messages[].cache_control"),
    harmless("messages[].content[].cache_control"),
    harmless("messages[].content[].annotations"),
    refused("messages[].prefix", nothing, "use continue_final_message"),
    refused(
        "chat_template",
        never,
        "the server has one template, its own or the model's: --chat-template",
    ),
    refused("mm_processor_kwargs", nothing, "only text is understood"),
    refused("media_io_kwargs", nothing, "only text is understood"),
];

const CHAT: &[Rule] = &[
    refused("prompt", nothing, "use messages, or POST /v1/completions"),
    refused("inputs", nothing, "use messages"),
    refused("input", nothing, "use messages"),
    refused("instructions", nothing, "send a message with the role system"),
    refused("system", nothing, "send a message with the role system"),
    refused("system_prompt", nothing, "send a message with the role system"),
    refused("add_special_tokens", no, "the chat template writes them"),
    refused("audio", never, "only text is understood"),
    refused("best_of", one, "use n"),
    refused("suffix", nothing, "use POST /v1/completions"),
    refused("echo", no, "use POST /v1/completions"),
    refused("prediction", never, ""),
    refused("safe_prompt", nothing, "send a message with the role system"),
    refused(
        "enable_thinking",
        never,
        "use chat_template_kwargs, as {\"enable_thinking\": true}",
    ),
    refused(
        "think",
        nothing,
        "use chat_template_kwargs, as {\"enable_thinking\": true}",
    ),
    refused(
        "thinking",
        disabled,
        "use chat_template_kwargs, as {\"enable_thinking\": true}",
    ),
    refused("reasoning", nothing, "use chat_template_kwargs"),
    refused("verbosity", medium, "ask for it in a message"),
    refused("web_search_options", never, ""),
    refused(
        "stream_reasoning",
        yes,
        "an answer that is not streamed brings it whole",
    ),
    refused("tools[].name", never, FUNCTION),
    refused("tools[].description", never, FUNCTION),
    refused("tools[].parameters", never, FUNCTION),
    refused("tools[].strict", never, FUNCTION),
    refused("tools[].input_schema", never, FUNCTION),
    // The prefix cache needs no hints.
    harmless("tools[].cache_control"),
    harmless("functions[].cache_control"),
    refused("tool_choice.name", never, "put it into function"),
    refused(
        "tool_choice.disable_parallel_tool_use",
        nothing,
        "use parallel_tool_calls",
    ),
];

const COMPLETIONS: &[Rule] = &[
    refused("messages", nothing, "use prompt, or POST /v1/chat/completions"),
    refused("inputs", nothing, "use prompt"),
    refused("input", nothing, "use prompt"),
    refused("max_completion_tokens", never, MAX_TOKENS),
    refused("top_logprobs", nothing, "use logprobs, which is a number here"),
    refused("return_full_text", nothing, "use echo"),
    refused("suffix", nothing, ""),
    refused("chat_template", never, CONVERSATION),
    refused("chat_template_kwargs", nothing, CONVERSATION),
    refused("reasoning_effort", never, CONVERSATION),
    refused("thinking_token_budget", never, CONVERSATION),
    refused("documents", nothing, CONVERSATION),
    refused("modalities", nothing, NO_SOUND),
    refused("audio", never, NO_SOUND),
    refused("prediction", never, ""),
    refused("prompt_embeds", nothing, "send text or token ids as prompt"),
    refused("image_data", nothing, "only text is understood"),
    refused("images", nothing, "only text is understood"),
    refused(
        "system",
        nothing,
        "put it into the prompt, or use POST /v1/chat/completions",
    ),
    refused(
        "template",
        nothing,
        "put it into the prompt, or use POST /v1/chat/completions",
    ),
];

/// Anthropic's, of /v1/messages and /v1/messages/count_tokens.
const ANTHROPIC: &[Rule] = &[
    refused("response_format", nothing, FORMS),
    refused("structured_outputs", nothing, FORMS),
    refused("guided_json", nothing, FORMS),
    refused("guided_regex", nothing, FORMS),
    refused("guided_choice", nothing, FORMS),
    refused("guided_grammar", nothing, FORMS),
    refused("json_schema", nothing, FORMS),
    refused("grammar", nothing, FORMS),
    // The prefix cache needs no hints.
    harmless("cache_control"),
    harmless("system[].cache_control"),
    harmless("messages[].content[].cache_control"),
    harmless("messages[].content[].content[].cache_control"),
    harmless("tools[].cache_control"),
    // Where the sender runs, and how its answers are found to differ.
    harmless("inference_geo"),
    harmless("diagnostics"),
    harmless("user_profile_id"),
    harmless("workspace_id"),
    // What an answer's blocks had, when they come back.
    refused(
        "messages[].content[].citations",
        nothing,
        "put them into the text",
    ),
    refused("system[].citations", nothing, "put them into the text"),
    refused(
        "messages[].content[].source",
        nothing,
        "images and documents are not understood, only text",
    ),
    harmless("messages[].content[].caller"),
    refused("messages[].content[].toolset_name", nothing, ""),
    // Arguments come as they are written.
    harmless("tools[].eager_input_streaming"),
    refused(
        "tools[].defer_loading",
        nothing,
        "offer the tools that the model may need",
    ),
    refused("tools[].allowed_callers", nothing, "only the model calls"),
    refused("tools[].input_examples", nothing, "put them into description"),
    refused("tools[].parameters", never, "it is called input_schema here"),
    refused(
        "tools[].function",
        never,
        "name, description and input_schema stand in the tool itself",
    ),
    refused("tool_choice.function", never, "use name"),
    refused("container", nothing, ""),
    refused(
        "mcp_servers",
        nothing,
        "call the servers yourself, and offer what they do as tools",
    ),
    refused(
        "context_management",
        nothing,
        "send the messages that are to be read",
    ),
    refused("output_format", nothing, "use output_config.format"),
    refused("task_budget", never, "use max_tokens"),
    refused("output_config.task_budget", never, "use max_tokens"),
    refused("speed", standard, "there is one speed"),
    refused("stop", nothing, "use stop_sequences"),
    refused("n", one, "send the request again"),
    refused("max_completion_tokens", never, MAX_TOKENS),
    refused("response_format", nothing, "use output_config.format"),
    refused("reasoning_effort", nothing, "use output_config.effort"),
    refused(
        "parallel_tool_calls",
        yes,
        "use tool_choice.disable_parallel_tool_use",
    ),
    refused("prompt", nothing, "use messages"),
    refused("betas", nothing, "what is built needs no header"),
    refused("anthropic_beta", nothing, "what is built needs no header"),
    // Of the body where the API is another cloud's.
    harmless("anthropic_version"),
];

/// Of a prompt that is only counted.
const COUNT: &[Rule] = &[
    harmless("max_tokens"),
    harmless("stream"),
    harmless("temperature"),
    harmless("top_p"),
    harmless("top_k"),
    harmless("stop_sequences"),
];

/// Of /v1/responses.
const RESPONSES: &[Rule] = &[
    // What an answer's parts had, when they come back.
    refused("input[].content[].annotations", nothing, "put them into the text"),
    harmless("input[].content[].logprobs"),
    harmless("input[].phase"),
    refused(
        "input[].content[].image_url",
        nothing,
        "images are not understood, only text",
    ),
    refused(
        "input[].content[].file_id",
        nothing,
        "files are not understood, only text",
    ),
    refused(
        "input[].content[].file_data",
        nothing,
        "files are not understood, only text",
    ),
    refused(
        "input[].output[].image_url",
        nothing,
        "images are not understood, only text",
    ),
    harmless("input[].content[].detail"),
    // There are no built-in tools to call.
    harmless("max_tool_calls"),
    refused("conversation", nothing, "use previous_response_id"),
    refused("prompt", nothing, "send what it says as instructions and input"),
    refused(
        "context_management",
        nothing,
        "send an input that fits the context",
    ),
    refused("moderation", nothing, ""),
    refused("text.verbosity", medium, "ask for it in instructions"),
    refused("verbosity", medium, "ask for it in instructions"),
    refused(
        "reasoning.generate_summary",
        auto,
        "nothing here makes summaries, the reasoning itself is in the output",
    ),
    refused(
        "tools[].function",
        never,
        "name, description and parameters stand in the tool itself",
    ),
    refused(
        "tools[].defer_loading",
        nothing,
        "offer the functions that the model may need",
    ),
    refused("tool_choice.function", never, "use name"),
    refused("messages", nothing, "use input"),
    refused("system", nothing, "use instructions"),
    refused("max_tokens", never, "use max_output_tokens"),
    refused("max_completion_tokens", never, "use max_output_tokens"),
    refused("response_format", nothing, "use text.format"),
    refused("reasoning_effort", nothing, "use reasoning.effort"),
    refused("n", one, "send the request again"),
    refused(
        "logprobs",
        nothing,
        "use include with message.output_text.logprobs",
    ),
    refused("max_output_token", never, "use max_output_tokens"),
];

/// Of /generate, /generate_stream and /.
const GENERATE: &[Rule] = &[
    refused("model", nothing, "use parameters.adapter_id"),
    refused("adapter_id", nothing, "put it into parameters"),
    refused("parameters.adapter_source", nothing, LOAD),
    refused("parameters.api_token", nothing, LOAD),
    refused(
        "parameters.merged_adapters",
        nothing,
        "load a merged adapter and name it as adapter_id",
    ),
    refused("parameters.response_format", nothing, "use grammar"),
    refused("parameters.return_k_alternatives", nothing, "use top_n_tokens"),
    refused("parameters.ignore_eos_token", nothing, "use POST /v1/completions"),
    refused("parameters.max_tokens", never, "use max_new_tokens"),
    refused("parameters.num_return_sequences", one, "send the request again"),
    refused("parameters.max_length", never, "use max_new_tokens"),
    refused("prompt", nothing, "use inputs"),
    refused("messages", nothing, "use POST /v1/chat/completions"),
    // Settings of Hugging Face's hosted servers.
    harmless("options"),
];

const TOKENIZE: &[Rule] = &[
    refused("content", nothing, "use prompt"),
    refused("text", nothing, "use prompt"),
    refused("inputs", nothing, "use prompt"),
    refused("input", nothing, "use prompt"),
    refused("add_special", never, "use add_special_tokens"),
    refused("with_pieces", nothing, "use return_token_strs"),
];

const LORA: &[Rule] = &[
    // A number that other servers know an adapter by inside.
    harmless("lora_int_id"),
    harmless("lora_id"),
    // What an adapter was made for is checked by its shapes.
    harmless("base_model_name"),
    // Adapters stay as long as there is room, and come back when they are asked.
    harmless("pinned"),
    refused("is_3d_lora_weight", nothing, ""),
    refused("scale", one, SCALE),
    refused("scaling", one, SCALE),
    refused("weight", one, SCALE),
    refused("lora_alpha", never, SCALE),
    refused(
        "adapter_config",
        nothing,
        "write it into the folder's adapter_config.json",
    ),
    refused("lora_scale", one, SCALE),
    refused(
        "lora_source",
        nothing,
        "use lora_path, a folder of the server's machine",
    ),
];

const LISTS: &str = "lists are read by the parameters that /docs names; choose among their items yourself";

/// What clients put into queries beside the names of the document.
pub const QUERY: &[Rule] = &[
    // Azure's clients name the version they were written for.
    harmless("api-version"),
    // Against caches.
    harmless("_"),
    refused("status", nothing, LISTS),
    refused("model", nothing, LISTS),
    refused("before", nothing, LISTS),
    refused("order", nothing, LISTS),
    refused("sort", nothing, LISTS),
    refused("offset", nothing, LISTS),
    refused("page", nothing, LISTS),
    refused("filter", nothing, LISTS),
    refused("search", nothing, LISTS),
    refused("purpose", nothing, LISTS),
    refused("created_after", nothing, LISTS),
    refused("created_before", nothing, LISTS),
    refused(
        "api_key",
        nothing,
        "send the key in the header: Authorization: Bearer YOUR_KEY",
    ),
    refused(
        "key",
        nothing,
        "send the key in the header: Authorization: Bearer YOUR_KEY",
    ),
];

#[cfg(test)]
mod tests {
    use prometheus::IntCounter;
    use serde_json::{Value, json};
    use tandem_openapi::adapters::LoadLoraAdapter;
    use tandem_openapi::chat::ChatRequest;
    use tandem_openapi::completions::CompletionRequest;
    use tandem_openapi::tokenize::TokenizeRequest;

    use super::*;
    use crate::fields::{Strays, strays};

    fn refusal<T: Body>(judge: &Strays, body: &Value) -> Option<String> {
        let strays = strays(T::SCHEMA, body.to_string().as_bytes());
        let error = judge.judge_all(strays, T::RULES.expect("rules")).err()?;
        Some(error.to_string())
    }

    #[test]
    fn a_field_is_harmless_refused_misspelt_or_counted() {
        let ignored = IntCounter::new("ignored", "ignored").unwrap();
        let judge = Strays::new(false, ignored.clone());
        // The field, and a part of the refusal; "" passes.
        for (body, expected) in [
            (
                json!({"tools": [{"type": "function", "name": "f"}]}),
                "tools[0].name is not supported",
            ),
            (
                json!({"stream_reasoning": false}),
                "stream_reasoning is not supported",
            ),
            (json!({"regex": "a"}), "use structured_outputs"),
            (json!({"adapter_id": "nope"}), "name the adapter as model"),
            (json!({"lora_path": "/x"}), "load_lora_adapter"),
            (json!({"max_new_tokens": 0}), "use max_tokens"),
            (json!({"temp": 0.1}), "use temperature"),
            (json!({"extra_body": {"top_k": 1}}), "into the body itself"),
            (
                json!({"messages": [{"audio": {"id": "x"}}]}),
                "messages[0].audio is not supported",
            ),
            (
                json!({"stream_options": {"include_usge": true}}),
                "did you mean 'include_usage'?",
            ),
            (
                json!({"max_completion_token": 3}),
                "did you mean 'max_completion_tokens'?",
            ),
            (json!({"best_of": 2}), "use n"),
            (
                json!({"tools": [], "tool_choice": "none", "guided_json": null, "adapter_id": null}),
                "",
            ),
            (
                json!({"user": "me", "store": false, "service_tier": "auto", "metadata": {"a": "b"}}),
                "",
            ),
            (json!({"messages": [{"refusal": null, "annotations": []}]}), ""),
            (json!({"messages": [{"type": "text", "images": []}]}), ""),
            (
                json!({"messages": [{"images": ["aGk="]}]}),
                "messages[0].images is not supported",
            ),
            (
                json!({"logit_bias": {"17": 1}, "chat_template_kwargs": {"max_new_tokens": 1}}),
                "",
            ),
        ] {
            let refusal = refusal::<ChatRequest>(&judge, &body).unwrap_or_default();
            assert!(refusal.contains(expected), "{body}: {refusal:?}");
            assert_eq!(refusal.is_empty(), expected.is_empty(), "{body}: {refusal}");
        }
        assert_eq!(ignored.get(), 0);
        for (body, expected) in [
            (json!({"suffix": "end"}), "suffix is not supported"),
            (json!({"messages": [{}]}), "POST /v1/chat/completions"),
            (json!({"suffix": null, "top_logprobs": 0}), ""),
        ] {
            let refusal = refusal::<CompletionRequest>(&judge, &body).unwrap_or_default();
            assert!(
                refusal.contains(expected) && refusal.is_empty() == expected.is_empty(),
                "{body}: {refusal}"
            );
        }
        let unknown = json!({"something_new": 3});
        assert_eq!(refusal::<ChatRequest>(&judge, &unknown), None);
        assert_eq!(ignored.get(), 1);
        let strict = Strays::new(true, ignored);
        assert!(refusal::<ChatRequest>(&strict, &unknown).is_some_and(|text| text.contains("something_new")));
        assert_eq!(
            refusal::<ChatRequest>(&strict, &json!({"user": "me", "something_new": null})),
            None
        );
    }

    #[test]
    fn no_rule_is_about_a_field_that_is_known() {
        for (schema, rules) in [
            (ChatRequest::SCHEMA, ChatRequest::RULES),
            (CompletionRequest::SCHEMA, CompletionRequest::RULES),
            (TokenizeRequest::SCHEMA, TokenizeRequest::RULES),
            (LoadLoraAdapter::SCHEMA, LoadLoraAdapter::RULES),
        ] {
            for rule in rules.into_iter().flatten().copied().flatten() {
                if rule.field.contains('.') {
                    continue;
                }
                let body = json!({rule.field: 1}).to_string();
                let found = strays(schema, body.as_bytes());
                assert_eq!(
                    found.len(),
                    1,
                    "{schema} has the field {}: its rule is dead",
                    rule.field
                );
            }
        }
    }
}
