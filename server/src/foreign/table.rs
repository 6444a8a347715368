//! The options, spellings and variables of other servers, and what each comes to here. Not here: how they are looked up.

/// An option of another server.
pub(super) struct Foreign {
    /// Without the dashes; further spellings behind it.
    pub names: &'static [&'static str],
    pub takes: Takes,
    pub says: Says,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    Value,
    /// `--x`, `--x=false`, `--no-x`.
    Nothing,
}

pub(super) enum Says {
    /// Ours under another name.
    SameAs(&'static str),
    /// Changes nothing here: why.
    Harmless(&'static str),
    /// The same, with one of these values; with another, what to use.
    HarmlessIf(&'static [&'static str], &'static str, &'static str),
    /// What to use, or what there is not.
    Refused(&'static str),
}

use Says::{Harmless, HarmlessIf, Refused, SameAs};

const fn value(names: &'static [&'static str], says: Says) -> Foreign {
    let takes = Takes::Value;
    Foreign { names, takes, says }
}

const fn switch(names: &'static [&'static str], says: Says) -> Foreign {
    let takes = Takes::Nothing;
    Foreign { names, takes, says }
}

const ONE: &[&str] = &["1"];
const AUTO: &[&str] = &["auto"];
const NO_SPECULATION: &str = "--speculative-config '{\"method\": \"ngram\", \"num_speculative_tokens\": N}' guesses from the text itself";
const NO_MEDIA: &str = "only text is understood";
const NO_DATA_PARALLEL: &str = "start a `tandem backend` for each replica and a `tandem router` before them";
const NO_PIPELINE: &str = "layers are not divided over ranks: use --tensor-parallel-size";
const HUB_CACHE: &str = "the hub's cache is said by the variable HF_HUB_CACHE, or HF_HOME";
const NO_OVERRIDES: &str = "edit the config.json of the model's folder instead";
const NO_GRAPHS: &str = "no graphs are captured and nothing is compiled here";
const IN_FOLDER: &str = "the tokenizer is the one in the model's folder; put the files there";
const IN_REQUEST: &str = "it is a field of a request, or a default of the model's generation_config.json";
const OWN_LOG: &str = "the log is set by the variable TANDEM_LOG (info, debug, warn, ...)";
const OWN_MEMORY: &str = "KV blocks of the running sequences stay in memory; who does not fit waits";
const OWN_BLOCKS: &str = "the KV cache has blocks of its own size; answers do not depend on it";
const OWN_PREFIXES: &str = "prefixes are always cached, and answers are the same with and without";
const OWN_CHUNKS: &str = "long prompts are always cut into chunks, and answers are the same with and without";
const OWN_COLLECTIVES: &str = "ranks are summed by this program's own choice";
const OWN_ADAPTERS: &str = "adapters can always be loaded";
const BOTH: &str = "any model generates, and makes vectors at /v1/embeddings";
const ONLY_BOTH: &str = "models generate, and make vectors at /v1/embeddings: nothing else is served";
const IN_EMBEDDINGS: &str = "it is a field of a request to /v1/embeddings: pooling, normalize, dimensions";
const OWN_LOADER: &str = "safetensors and GGUF are told apart by their contents, and mapped into memory";

/// By server, vLLM first.
pub(super) const TABLE: &[Foreign] = &[
    // ---- vLLM: the model
    value(&["tokenizer", "hf-config-path"], Refused(IN_FOLDER)),
    value(
        &["tokenizer-mode"],
        HarmlessIf(&["auto", "hf", "slow"], "tokenizer.json is read", IN_FOLDER),
    ),
    switch(
        &["skip-tokenizer-init"],
        Refused("the server always reads the tokenizer"),
    ),
    switch(
        &["trust-remote-code"],
        Harmless("no code of a model's folder is ever run"),
    ),
    value(
        &["code-revision"],
        Harmless("no code of a model's folder is ever run"),
    ),
    value(
        &["tokenizer-revision"],
        Refused("the tokenizer comes with the model: use --revision"),
    ),
    value(
        &["hf-token"],
        Refused("the hub's token is said by the variable HF_TOKEN, or by `hf auth login`"),
    ),
    value(&["download-dir"], Refused(HUB_CACHE)),
    value(
        &["load-format"],
        HarmlessIf(
            &["auto", "safetensors", "fastsafetensors", "gguf"],
            OWN_LOADER,
            "weights are read from safetensors and GGUF",
        ),
    ),
    value(
        &["config-format"],
        HarmlessIf(
            &["auto", "hf"],
            "config.json is read",
            "the folder's config.json is read",
        ),
    ),
    value(
        &["model-impl"],
        HarmlessIf(
            &["auto", "vllm"],
            "there is one implementation",
            "there is one implementation: leave it out",
        ),
    ),
    value(
        &["runner"],
        HarmlessIf(&["auto", "generate", "pooling"], BOTH, ONLY_BOTH),
    ),
    value(
        &["task"],
        HarmlessIf(&["auto", "generate", "embed", "embedding"], BOTH, ONLY_BOTH),
    ),
    value(
        &["convert"],
        HarmlessIf(&["auto", "none", "embed"], BOTH, ONLY_BOTH),
    ),
    value(
        &["hf-overrides", "rope-scaling", "rope-theta"],
        Refused(NO_OVERRIDES),
    ),
    switch(&["disable-sliding-window"], Refused(NO_OVERRIDES)),
    value(&["override-generation-config"], Refused(IN_REQUEST)),
    value(
        &["pooler-config", "override-pooler-config"],
        Refused(IN_EMBEDDINGS),
    ),
    value(
        &["max-logprobs"],
        HarmlessIf(
            &["0", "1", "2", "3", "4", "5", "10", "15", "20"],
            "a request may ask for up to 20",
            "a request may ask for up to 20, and that is fixed",
        ),
    ),
    value(
        &["logprobs-mode"],
        HarmlessIf(
            &["raw_logprobs"],
            "these are what is returned",
            "raw_logprobs are returned: leave it out",
        ),
    ),
    value(
        &["logits-processor-pattern", "logits-processors"],
        Refused("no code of yours runs in the server"),
    ),
    switch(
        &["enable-prompt-embeds"],
        Refused("prompts are text or token ids"),
    ),
    switch(
        &["enable-sleep-mode"],
        Refused("the server does not sleep: stop it"),
    ),
    // ---- vLLM: memory and speed
    value(
        &[
            "gpu-memory-utilization",
            "mem-fraction-static",
            "cuda-memory-fraction",
        ],
        Refused("what the KV cache may take is said in bytes: use --kv-cache-memory-bytes, such as 8G"),
    ),
    value(
        &["num-gpu-blocks-override"],
        Refused("what the KV cache may take is said in bytes: use --kv-cache-memory-bytes"),
    ),
    value(&["block-size", "page-size"], Harmless(OWN_BLOCKS)),
    value(&["swap-space"], Harmless(OWN_MEMORY)),
    value(
        &["cpu-offload-gb"],
        HarmlessIf(
            &["0", "0.0"],
            OWN_MEMORY,
            "weights stay on the device: use --tensor-parallel-size",
        ),
    ),
    switch(
        &["calculate-kv-scales"],
        Harmless("each token's own are always taken"),
    ),
    switch(
        &["enable-prefix-caching", "disable-radix-cache"],
        Harmless(OWN_PREFIXES),
    ),
    value(&["prefix-caching-hash-algo"], Harmless(OWN_PREFIXES)),
    switch(
        &["enable-chunked-prefill", "disable-chunked-mm-input"],
        Harmless(OWN_CHUNKS),
    ),
    value(
        &[
            "max-num-partial-prefills",
            "max-long-partial-prefills",
            "long-prefill-token-threshold",
        ],
        Harmless(OWN_CHUNKS),
    ),
    switch(
        &["enforce-eager", "disable-cuda-graph", "disable-cascade-attn"],
        Harmless(NO_GRAPHS),
    ),
    value(
        &[
            "compilation-config",
            "optimization-level",
            "max-seq-len-to-capture",
            "cuda-graph-sizes",
            "cudagraph-capture-sizes",
            "cuda-graph-max-bs",
            "cuda-graphs",
        ],
        Harmless(NO_GRAPHS),
    ),
    value(
        &["attention-backend", "attention-config", "kernel-config"],
        Harmless("kernels are chosen by the machine"),
    ),
    switch(
        &["async-scheduling", "use-v2-block-manager"],
        Harmless("there is one scheduler, and it does what is best"),
    ),
    value(
        &[
            "num-scheduler-steps",
            "num-lookahead-slots",
            "stream-interval",
            "scheduler-delay-factor",
        ],
        Harmless("every token is sent when it is there"),
    ),
    value(
        &["scheduler-cls", "worker-cls", "worker-extension-cls"],
        Refused("no code of yours runs in the server"),
    ),
    value(
        &["speculative-model", "num-speculative-tokens", "spec-method"],
        Refused(NO_SPECULATION),
    ),
    switch(&["disable-hybrid-kv-cache-manager"], Harmless(OWN_BLOCKS)),
    value(&["max-parallel-loading-workers"], Harmless(OWN_LOADER)),
    value(
        &["safetensors-load-strategy", "model-loader-extra-config"],
        Harmless(OWN_LOADER),
    ),
    switch(
        &["use-tqdm-on-load"],
        Harmless("nothing is drawn while weights load"),
    ),
    // ---- vLLM: ranks
    value(
        &["workers", "uvicorn-workers", "num-workers", "worker-num"],
        HarmlessIf(ONE, "there is one process", NO_DATA_PARALLEL),
    ),
    value(
        &["timeout-keep-alive", "backlog", "limit-concurrency"],
        Harmless("another HTTP server has other limits"),
    ),
    switch(
        &["reload"],
        Refused("adapters are loaded while it runs; for another model start again"),
    ),
    value(
        &["pipeline-parallel-size", "pp-size"],
        HarmlessIf(ONE, "there is one stage", NO_PIPELINE),
    ),
    value(
        &["data-parallel-size", "dp-size", "api-server-count"],
        HarmlessIf(ONE, "there is one replica", NO_DATA_PARALLEL),
    ),
    value(
        &[
            "data-parallel-rank",
            "data-parallel-start-rank",
            "data-parallel-size-local",
            "data-parallel-address",
            "data-parallel-rpc-port",
            "data-parallel-backend",
        ],
        Refused(NO_DATA_PARALLEL),
    ),
    switch(
        &["data-parallel-hybrid-lb", "data-parallel-external-lb", "headless"],
        Refused(NO_DATA_PARALLEL),
    ),
    value(
        &[
            "nnodes",
            "node-rank",
            "master-addr",
            "master-port",
            "dist-init-addr",
        ],
        Refused("set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, as torchrun does"),
    ),
    switch(
        &["enable-expert-parallel"],
        Refused("mixtures of experts are not built yet"),
    ),
    value(
        &["decode-context-parallel-size", "prefill-context-parallel-size"],
        HarmlessIf(ONE, "it is one", NO_PIPELINE),
    ),
    switch(
        &[
            "disable-custom-all-reduce",
            "ray-workers-use-nsight",
            "enable-dbo",
        ],
        Harmless(OWN_COLLECTIVES),
    ),
    // ---- vLLM: adapters
    switch(&["enable-lora"], Harmless(OWN_ADAPTERS)),
    value(
        &["max-cpu-loras"],
        Harmless("adapters that are not resident lie on disk, any number of them"),
    ),
    value(
        &["lora-dtype"],
        HarmlessIf(
            AUTO,
            "it is the weights'",
            "adapters are served in the dtype of the weights: use --dtype",
        ),
    ),
    value(&["lora-extra-vocab-size"], Refused("adapters cannot add tokens")),
    value(
        &["long-lora-scaling-factors"],
        Refused("LongLoRA is not supported"),
    ),
    switch(
        &["fully-sharded-loras", "enable-lora-bias"],
        Harmless("adapters are divided as their linears are"),
    ),
    value(&["default-mm-loras"], Refused(NO_MEDIA)),
    switch(
        &["enable-prompt-adapter"],
        Refused("only LoRA adapters are served"),
    ),
    value(
        &["max-prompt-adapters", "max-prompt-adapter-token"],
        Refused("only LoRA adapters are served"),
    ),
    // ---- vLLM: the API
    value(&["chat-template-file"], SameAs("chat-template")),
    value(
        &["chat-template-content-format"],
        HarmlessIf(
            AUTO,
            "it is found in the template",
            "it is found in the template: leave it out",
        ),
    ),
    value(
        &["default-chat-template-kwargs", "chat-template-kwargs"],
        Refused("chat_template_kwargs is a field of a request"),
    ),
    switch(
        &["trust-request-chat-template"],
        Refused("templates are the server's: use --chat-template"),
    ),
    value(
        &["response-role"],
        HarmlessIf(
            &["assistant"],
            "it is the assistant",
            "answers come from the assistant",
        ),
    ),
    switch(
        &["return-tokens-as-token-ids"],
        Refused("it is not a field of answers here"),
    ),
    switch(
        &["enable-auto-tool-choice"],
        Harmless("the model may always choose to call the tools of a request"),
    ),
    switch(
        &["exclude-tools-when-tool-choice-none"],
        Refused("send such a request without tools"),
    ),
    value(
        &["tool-parser-plugin", "tool-server", "tool-parser"],
        Refused("the formats of calls are this program's own: use --tool-call-parser"),
    ),
    value(
        &["reasoning-format", "reasoning-parser-plugin"],
        Refused("the formats of reasoning are this program's own: use --reasoning-parser"),
    ),
    value(
        &["reasoning-config"],
        Refused("what stands around reasoning is told by the chat template, or by --reasoning-parser"),
    ),
    value(
        &["reasoning-budget"],
        Refused("requests say it: use thinking_token_budget"),
    ),
    value(
        &[
            "guided-decoding-backend",
            "structured-outputs-config",
            "grammar-backend",
            "grammar",
            "json-schema",
        ],
        Refused(
            "requests bring their grammars (response_format, structured_outputs), and llguidance follows all of them",
        ),
    ),
    value(
        &[
            "limit-mm-per-prompt",
            "mm-processor-kwargs",
            "media-io-kwargs",
            "allowed-local-media-path",
            "mmproj",
        ],
        Refused(NO_MEDIA),
    ),
    switch(&["disable-mm-preprocessor-cache"], Harmless(NO_MEDIA)),
    switch(
        &[
            "enable-prompt-tokens-details",
            "enable-tokenizer-info-endpoint",
            "enable-request-id-headers",
        ],
        Harmless("it is always so here"),
    ),
    switch(
        &["enable-force-include-usage"],
        Refused("a request asks for it with stream_options.include_usage"),
    ),
    switch(
        &["enable-server-load-tracking", "enable-metrics", "metrics"],
        Harmless("/metrics always has it"),
    ),
    value(
        &["allowed-methods", "allowed-headers"],
        HarmlessIf(
            &["*", "[\"*\"]"],
            "all of the API's are allowed",
            "all of the API's are allowed: leave it out",
        ),
    ),
    switch(
        &["allow-credentials"],
        Refused("the API knows bearer tokens, no cookies"),
    ),
    value(&["ssl-key-file"], SameAs("ssl-keyfile")),
    value(&["ssl-cert-file"], SameAs("ssl-certfile")),
    value(
        &["ssl-ciphers"],
        Refused("ciphers are those of TLS 1.2 and 1.3 that are known to be safe"),
    ),
    switch(
        &["enable-ssl-refresh"],
        Refused("certificates are read again at SIGHUP: have whoever renews them send it"),
    ),
    value(&["api-prefix"], SameAs("root-path")),
    value(&["uds"], Refused("the server listens on --host and --port")),
    value(&["middleware"], Refused("no code of yours runs in the server")),
    switch(
        &["disable-fastapi-docs", "no-webui"],
        Refused("pages are part of the server; keep them from others by --api-key"),
    ),
    value(
        &["h11-max-incomplete-event-size", "h11-max-header-count"],
        Harmless("another HTTP server has other limits"),
    ),
    // ---- vLLM: the log
    switch(
        &[
            "disable-log-requests",
            "disable-log-stats",
            "enable-log-outputs",
            "log-disable",
        ],
        Harmless(OWN_LOG),
    ),
    switch(
        &[
            "enable-log-requests",
            "log-requests",
            "enable-log-deltas",
            "log-error-stack",
        ],
        Harmless(OWN_LOG),
    ),
    value(
        &["uvicorn-log-level", "log-level", "max-log-len", "log-config-file"],
        Harmless(OWN_LOG),
    ),
    value(
        &["otlp-endpoint"],
        Refused("--otlp-traces-endpoint URL, which speaks OTLP over HTTP"),
    ),
    value(
        &["collect-detailed-traces"],
        Harmless("traces have the engine's steps and training's quanta anyway"),
    ),
    value(
        &["show-hidden-metrics-for-version"],
        Harmless("no metric is hidden"),
    ),
    value(
        &[
            "kv-transfer-config",
            "kv-events-config",
            "ec-transfer-config",
            "disaggregation-mode",
        ],
        Refused("prefill and decode are not served apart"),
    ),
    value(
        &["additional-config", "profiler-config", "observability-config"],
        Refused("it configures vLLM's own parts"),
    ),
    // ---- SGLang
    value(&["model-path", "model-id"], SameAs("model")),
    value(&["tp-size", "tp", "num-shard"], SameAs("tensor-parallel-size")),
    value(&["context-length", "max-total-tokens"], SameAs("max-model-len")),
    value(&["max-running-requests", "parallel"], SameAs("max-num-seqs")),
    value(&["lora-paths", "lora-adapters"], SameAs("lora-modules")),
    value(&["max-loras-per-batch"], SameAs("max-loras")),
    value(
        &[
            "chunked-prefill-size",
            "max-prefill-tokens",
            "max-batch-prefill-tokens",
            "max-batch-total-tokens",
            "batch-size",
            "ubatch-size",
        ],
        Refused("use --max-num-batched-tokens, which counts prompts and answers of a step"),
    ),
    value(&["max-queued-requests"], SameAs("max-waiting")),
    value(&["random-seed"], SameAs("seed")),
    switch(
        &["skip-server-warmup", "disable-overlap-schedule"],
        Harmless("there is nothing of the kind here"),
    ),
    // ---- TGI
    value(&["hostname"], SameAs("host")),
    value(&["quantize"], SameAs("quantization")),
    value(
        &["max-concurrent-requests"],
        Refused("use --max-num-seqs for those that run and --max-waiting for those that wait"),
    ),
    value(
        &["max-input-tokens", "max-input-length"],
        Refused("use --max-model-len, which counts prompt and answer together"),
    ),
    value(
        &["max-best-of", "max-stop-sequences", "max-top-n-tokens"],
        Harmless("`tandem serve --help` names the limits of a request"),
    ),
    value(
        &["huggingface-hub-cache", "weights-cache-override"],
        Refused(HUB_CACHE),
    ),
    value(
        &["speculate"],
        HarmlessIf(&["0"], "nothing is speculated", NO_SPECULATION),
    ),
    value(
        &["sharded"],
        HarmlessIf(&["false"], "it is not", "use --tensor-parallel-size"),
    ),
    // ---- llama.cpp
    value(&["alias"], SameAs("served-model-name")),
    value(
        &["ctx-size"],
        Refused("use --max-model-len for one sequence, and --kv-cache-memory-bytes for all"),
    ),
    value(
        &["gpu-layers", "n-gpu-layers"],
        Refused("a model lies on one device whole: use --device"),
    ),
    value(
        &["lora", "lora-scaled"],
        Refused("use --lora-modules NAME=DIR, a PEFT folder"),
    ),
    switch(
        &["lora-init-without-apply"],
        Harmless("a request names the adapter it wants"),
    ),
    value(&["hf-repo"], SameAs("model")),
    value(
        &["hf-file", "model-url"],
        Refused("use --model ORG/NAME, which holds safetensors"),
    ),
    switch(
        &[
            "mlock",
            "mmap",
            "cont-batching",
            "jinja",
            "kv-unified",
            "warmup",
            "slots",
            "props",
        ],
        Harmless("it is always so here, or has no counterpart"),
    ),
    value(
        &[
            "temp",
            "temperature",
            "top-k",
            "top-p",
            "min-p",
            "repeat-penalty",
            "predict",
            "n-predict",
        ],
        Refused(IN_REQUEST),
    ),
    switch(&["embedding", "embeddings"], Harmless(BOTH)),
    value(&["pooling", "embd-normalize"], Refused(IN_EMBEDDINGS)),
    switch(&["reranking"], Refused(ONLY_BOTH)),
    value(
        &["threads-http", "threads-batch", "max-client-batch-size"],
        Harmless("the edge has two threads of its own"),
    ),
    value(
        &["cache-type-k", "cache-type-v"],
        Refused("keys and values share one dtype: use --kv-cache-dtype"),
    ),
    value(
        &["draft-model", "model-draft", "draft-max"],
        Refused(NO_SPECULATION),
    ),
];

/// Variables by which other servers are set, and compose files of earlier versions; a name that ends with `_` is all
/// that begin so.
pub(super) const VARIABLES: &[(&str, &str)] = &[
    ("VLLM_API_KEY", "use TANDEM_API_KEY"),
    ("VLLM_PORT", "use TANDEM_PORT"),
    ("VLLM_LOGGING_LEVEL", "use TANDEM_LOG"),
    (
        "VLLM_CPU_KVCACHE_SPACE",
        "use TANDEM_KV_CACHE_MEMORY_BYTES, in bytes or as 4G",
    ),
    ("VLLM_CPU_OMP_THREADS_BIND", "use TANDEM_THREADS"),
    (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "adapters can always be loaded",
    ),
    (
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        "the context is the model's at most",
    ),
    ("VLLM_TARGET_DEVICE", "use TANDEM_DEVICE"),
    ("VLLM_USE_MODELSCOPE", "HF_ENDPOINT names another hub"),
    ("VLLM_HOST_IP", "use TANDEM_HOST, or MASTER_ADDR for ranks"),
    ("VLLM_", "`tandem serve --help` lists what can be set"),
    ("SGLANG_", "`tandem serve --help` lists what can be set"),
    ("LLAMA_ARG_", "`tandem serve --help` lists what can be set"),
    ("DATABASE_URL", "use TANDEM_DATABASE_URL"),
    ("ARTIFACT_URL", "use TANDEM_ARTIFACT_URL"),
];

/// One dash, several letters: clap knows none of them, vLLM's and llama.cpp's users type them.
pub(super) const SHORT: &[(&str, &str)] = &[
    ("-tp", "tensor-parallel-size"),
    ("-pp", "pipeline-parallel-size"),
    ("-dp", "data-parallel-size"),
    ("-asc", "api-server-count"),
    ("-q", "quantization"),
    ("-cc", "compilation-config"),
    ("-m", "model"),
    ("-a", "alias"),
    ("-c", "ctx-size"),
    ("-t", "threads"),
    ("-np", "parallel"),
    ("-b", "batch-size"),
    ("-ub", "ubatch-size"),
    ("-ngl", "gpu-layers"),
    ("-hf", "hf-repo"),
    ("-n", "predict"),
    ("-ctk", "cache-type-k"),
    ("-ctv", "cache-type-v"),
];
