//! What checkpoints call their tensors.

/// A tensor in safetensors, and in GGUF; of a layer, behind its number.
pub type Name = (&'static str, &'static str);

/// The embedding.
pub const EMBEDDING: Name = ("model.embed_tokens", "token_embd");
/// The final norm.
pub const FINAL_NORM: Name = ("model.norm", "output_norm");
/// The LM head.
pub const LM_HEAD: Name = ("lm_head", "output");

/// What is added to each expert's score for the choice.
pub const CHOICE_BIAS: Name = ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias");

/// Gate, up and down of the expert to which all rows go.
pub const SHARED_EXPERT: [Name; 3] = [
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
];

/// Queries of latent attention that are not compressed; what compresses them, the norm behind it, what makes queries of it.
pub const LATENT_QUERIES: [Name; 4] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
];
/// What compresses keys and values, the norm behind it, and what makes both of it.
pub const LATENT_KEYS: [Name; 3] = [
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
];
/// The last of them as GGUF files have it since 2025: for each head what turns queries into those of compressed keys, rank × nope, and what makes values.
pub const LATENT_SPLIT: [&str; 2] = ["attn_k_b", "attn_v_b"];

/// The tensors of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Norm before attention.
    pub input_norm: Name,
    /// Queries, keys and values, one below the other when there is one name.
    pub query_key_value: &'static [Name],
    /// Norms of queries and of keys.
    pub query_key_norm: [Name; 2],
    /// Output of attention.
    pub output: Name,
    /// Norm behind attention.
    pub attention_norm: Name,
    /// Norm before the feed-forward layer.
    pub feed_forward_norm: Name,
    /// Gate and up, one below the other when there is one name.
    pub gate_up: &'static [Name],
    /// Output of the feed-forward layer.
    pub down: Name,
    /// Norm behind the feed-forward layer.
    pub down_norm: Name,
    /// What chooses experts.
    pub router: Name,
    /// Gate, up and down of an expert, in safetensors with its number for `{}`; in GGUF those of all experts, one below the other.
    pub expert: [Name; 3],
    /// Whether safetensors keep the weights of norms less 1. GGUF has them whole.
    pub norms_less_one: bool,
}

impl Default for Names {
    /// Those of Llama, which most families share.
    fn default() -> Self {
        Self {
            input_norm: ("input_layernorm", "attn_norm"),
            query_key_value: &[("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v")],
            query_key_norm: [("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")],
            output: ("self_attn.o_proj", "attn_output"),
            attention_norm: ("post_attention_layernorm", "post_attention_norm"),
            feed_forward_norm: ("post_attention_layernorm", "ffn_norm"),
            gate_up: &[("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up")],
            down: ("mlp.down_proj", "ffn_down"),
            down_norm: ("post_feedforward_layernorm", "post_ffw_norm"),
            router: ("mlp.gate", "ffn_gate_inp"),
            expert: [
                ("mlp.experts.{}.gate_proj", "ffn_gate_exps"),
                ("mlp.experts.{}.up_proj", "ffn_up_exps"),
                ("mlp.experts.{}.down_proj", "ffn_down_exps"),
            ],
            norms_less_one: false,
        }
    }
}
