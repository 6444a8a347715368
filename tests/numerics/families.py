"""The families of tests/numerics: for each a tiny configuration in which whatever sets it apart changes the answer."""

# What all have in common, in the words most configurations use.
TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)

# The linears of a layer in the order in which they run, those of one product together.
SPLIT = [
    ("self_attn", ["q_proj", "k_proj", "v_proj"]),
    ("self_attn", ["o_proj"]),
    ("mlp", ["gate_proj", "up_proj"]),
    ("mlp", ["down_proj"]),
]
FUSED_MLP = [*SPLIT[:2], ("mlp", ["gate_up_proj"]), SPLIT[3]]
FUSED = [("self_attn", ["qkv_proj"]), *FUSED_MLP[1:]]
PLAIN = [*SPLIT[:2], ("mlp", ["c_fc"]), ("mlp", ["c_proj"])]
# peft adapts linears; transformers 5 holds experts and routers as plain parameters.
ATTENTION = SPLIT[:2]


def rope(**options):
    return {"rope_theta": 10000.0, "rope_type": "default", **options}


LINEAR4 = rope(rope_type="linear", factor=4.0)
HALVES = ["sliding_attention", "full_attention"]

# Name: the model's type, what its configuration has beside TINY (None: without it), its linears.
FAMILIES = {
    "mistral": ("mistral", dict(sliding_window=9), SPLIT),
    "ministral": ("ministral", dict(sliding_window=9, layer_types=HALVES), SPLIT),
    "qwen2": (
        "qwen2",
        dict(head_dim=None, hidden_size=64, use_sliding_window=True, sliding_window=9, max_window_layers=1),
        SPLIT,
    ),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True), SPLIT),
    "gemma": ("gemma", dict(tie_word_embeddings=True), SPLIT),
    "gemma2": (
        "gemma2",
        dict(
            tie_word_embeddings=True,
            sliding_window=9,
            query_pre_attn_scalar=5,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        SPLIT,
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            tie_word_embeddings=True,
            sliding_window=9,
            query_pre_attn_scalar=5,
            layer_types=HALVES,
            rope_parameters={"full_attention": rope(rope_type="linear", factor=8.0), "sliding_attention": rope(rope_theta=50.0)},
        ),
        SPLIT,
    ),
    "phi3": ("phi3", dict(rope_parameters=rope(partial_rotary_factor=0.5), sliding_window=9), FUSED),
    "olmo2": ("olmo2", {}, SPLIT),
    "olmo3": (
        "olmo3",
        dict(
            sliding_window=9,
            layer_types=HALVES,
            rope_parameters={"full_attention": LINEAR4, "sliding_attention": rope()},
        ),
        SPLIT,
    ),
    "granite": (
        "granite",
        dict(embedding_multiplier=3.0, attention_multiplier=0.5, residual_multiplier=0.3, logits_scaling=0.5),
        SPLIT,
    ),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0], head_dim=None, hidden_size=64), SPLIT),
    "yarn": (
        "llama",
        dict(
            rope_parameters=rope(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=0.5
            )
        ),
        SPLIT,
    ),
    "longrope": (
        "phi3",
        dict(
            head_dim=None,
            hidden_size=64,
            # All prompts are longer: transformers takes the short factors for those that are not, whatever the model's length.
            original_max_position_embeddings=3,
            rope_parameters=rope(
                rope_type="longrope",
                partial_rotary_factor=0.5,
                short_factor=[1.0, 1.5, 2.0, 3.0],
                long_factor=[1.0, 4.0, 6.0, 9.0],
            ),
        ),
        FUSED,
    ),
    "glm": ("glm", {}, FUSED_MLP),
    "glm4": ("glm4", {}, FUSED_MLP),
    "cohere2": (
        "cohere2",
        dict(
            head_dim=None,
            hidden_size=64,
            tie_word_embeddings=True,
            sliding_window=9,
            layer_types=HALVES,
            logit_scale=0.5,
        ),
        SPLIT,
    ),
    "starcoder2": (
        "starcoder2",
        dict(head_dim=None, hidden_size=64, tie_word_embeddings=True, sliding_window=9),
        PLAIN,
    ),
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=9), ATTENTION),
    "qwen2_moe": (
        "qwen2_moe",
        dict(
            head_dim=None,
            hidden_size=64,
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            use_sliding_window=True,
            sliding_window=9,
        ),
        ATTENTION,
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            num_hidden_layers=3,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        ),
        ATTENTION,
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            intermediate_size=64,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=9,
            swiglu_limit=1.0,
            rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        ),
        ATTENTION,
    ),
}
