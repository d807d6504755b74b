//! A small random Llama checkpoint, in Hugging Face's layout and as GGUF.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use carryon_worker::text::{Tokenizer, Vocabulary};
use safetensors::tensor::{Dtype, TensorView};

/// Sizes of the checkpoint; odd ones on purpose, so that no panel and no block is full.
pub struct Tiny {
    pub hidden: usize,
    pub feed_forward: usize,
    pub layers: usize,
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub tied: bool,
    pub seed: u64,
    /// Further tensors, under Hugging Face's names; they take the place of its own.
    pub extra: BTreeMap<String, Weight>,
}

impl Default for Tiny {
    fn default() -> Self {
        let (hidden, feed_forward, layers, heads, key_value_heads, head_dim, vocabulary) = (40, 72, 3, 6, 2, 10, 101);
        Self { hidden, feed_forward, layers, heads, key_value_heads, head_dim, vocabulary, tied: false, seed: 7, extra: BTreeMap::new() }
    }
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform between -1 and 1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// The tokens of [`Tiny::folder`]: the last five are control tokens.
pub fn vocabulary() -> Vec<String> {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ", "Ċ", "<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|e|>"].map(str::to_owned));
    tokens
}

/// Shape and values.
pub type Weight = (Vec<usize>, Vec<f32>);

impl Tiny {
    /// All tensors under Hugging Face's names.
    pub fn tensors(&self) -> BTreeMap<String, Weight> {
        let mut random = Random(self.seed);
        let mut tensors = BTreeMap::new();
        let (d, q, kv, f) = (self.hidden, self.heads * self.head_dim, self.key_value_heads * self.head_dim, self.feed_forward);
        let mut add = |name: String, shape: Vec<usize>| {
            let (scale, offset) = if shape.len() == 1 { (0.2, 1.0) } else { (1.7 / (shape[1] as f32).sqrt(), 0.0) };
            let values = (0..shape.iter().product::<usize>()).map(|_| random.unit() * scale + offset).collect();
            tensors.insert(name, (shape, values));
        };
        add("model.embed_tokens.weight".into(), vec![self.vocabulary, d]);
        for layer in 0..self.layers {
            for (part, shape) in [
                ("input_layernorm", vec![d]),
                ("self_attn.q_proj", vec![q, d]),
                ("self_attn.k_proj", vec![kv, d]),
                ("self_attn.v_proj", vec![kv, d]),
                ("self_attn.o_proj", vec![d, q]),
                ("post_attention_layernorm", vec![d]),
                ("mlp.gate_proj", vec![f, d]),
                ("mlp.up_proj", vec![f, d]),
                ("mlp.down_proj", vec![d, f]),
            ] {
                add(format!("model.layers.{layer}.{part}.weight"), shape);
            }
        }
        add("model.norm.weight".into(), vec![d]);
        if !self.tied {
            add("lm_head.weight".into(), vec![self.vocabulary, d]);
        }
        tensors.extend(self.extra.clone());
        tensors
    }

    /// `config.json`.
    pub fn config(&self) -> serde_json::Value {
        serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.key_value_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied, "attention_bias": false, "mlp_bias": false,
        })
    }

    /// Writes `config.json` and `model.safetensors` (f32) into `folder`.
    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
        let tensors = self.tensors();
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, (shape, values))| (name, TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).unwrap()))
            .collect();
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }

    /// A folder of its own with the checkpoint and a tokenizer, the same for all of 101 tokens.
    pub fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        let tokens = vocabulary();
        assert_eq!(tokens.len(), self.vocabulary);
        let token_types = tokens.iter().map(|token| if token.starts_with("<|") { 3 } else { 1 }).collect();
        let vocabulary = Vocabulary { tokens, token_types, pre: Some("gpt-2".to_owned()), ..Vocabulary::default() };
        let json = Tokenizer::from_vocabulary(&vocabulary).unwrap().to_json().unwrap();
        fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        folder
    }

    /// The same checkpoint as a GGUF file of f32 tensors, queries and keys interleaved as its converter leaves them.
    pub fn gguf(&self) -> Vec<u8> {
        self.gguf_with(&[])
    }

    /// [`Self::gguf`] with further metadata: whole entries, as they lie in the file.
    pub fn gguf_with(&self, entries: &[Vec<u8>]) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        let tensors = self.tensors();
        let integers = [
            ("llama.block_count", self.layers),
            ("llama.context_length", 512),
            ("llama.embedding_length", self.hidden),
            ("llama.feed_forward_length", self.feed_forward),
            ("llama.attention.head_count", self.heads),
            ("llama.attention.head_count_kv", self.key_value_heads),
            ("llama.attention.key_length", self.head_dim),
            ("llama.vocab_size", self.vocabulary),
        ];
        let floats = [("llama.attention.layer_norm_rms_epsilon", 1e-5f32), ("llama.rope.freq_base", 10_000.0)];
        file.extend(3u32.to_le_bytes());
        file.extend((tensors.len() as u64).to_le_bytes());
        file.extend(((integers.len() + floats.len() + entries.len() + 2) as u64).to_le_bytes());
        text(&mut file, "general.architecture");
        file.extend(8u32.to_le_bytes());
        text(&mut file, "llama");
        text(&mut file, "tokenizer.ggml.tokens");
        file.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
        file.extend(2u64.to_le_bytes());
        text(&mut file, "a");
        text(&mut file, "é");
        for (key, value) in integers {
            text(&mut file, key);
            file.extend([4u32.to_le_bytes(), (value as u32).to_le_bytes()].concat());
        }
        for (key, value) in floats {
            text(&mut file, key);
            file.extend([6u32.to_le_bytes(), value.to_le_bytes()].concat());
        }
        file.extend(entries.concat());
        let mut data = Vec::new();
        for (name, (shape, values)) in &tensors {
            text(&mut file, &gguf_name(name));
            file.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|size| file.extend((*size as u64).to_le_bytes()));
            file.extend(0u32.to_le_bytes());
            data.resize(data.len().next_multiple_of(32), 0);
            file.extend((data.len() as u64).to_le_bytes());
            let heads = if name.ends_with("q_proj.weight") { self.heads } else { self.key_value_heads };
            let interleaved = name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight");
            let values = if interleaved { interleave(values, heads, self.head_dim, shape[1]) } else { values.clone() };
            data.extend(bytemuck::cast_slice::<f32, u8>(&values));
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }
}

/// The converter's `reshape(heads, 2, d / 2, cols).swapaxes(1, 2)`.
fn interleave(values: &[f32], heads: usize, head_dim: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                out.extend(&values[(head * head_dim + half * head_dim / 2 + pair) * cols..][..cols]);
            }
        }
    }
    out
}

fn text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn gguf_name(name: &str) -> String {
    let (layer, part) = match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => (format!("blk.{layer}."), part),
        None => (String::new(), name),
    };
    let (module, kind) = part.rsplit_once('.').unwrap();
    let module = match module {
        "model.embed_tokens" => "token_embd",
        "model.norm" => "output_norm",
        "lm_head" => "output",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("{layer}{module}.{kind}")
}
