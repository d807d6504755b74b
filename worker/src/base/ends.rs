//! The tokens that end an answer.

use crate::text::Tokenizer;

/// Tokens that end a turn wherever a vocabulary has them: llama.cpp's list (`special_eog_ids`, src/llama-vocab.cpp), for a checkpoint often
/// names the end of a text alone.
const KNOWN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
];

/// The ends that a checkpoint names, in its order, then those that are known, each once.
pub fn end_tokens(tokenizer: &Tokenizer, named: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let has = |token: &str| tokenizer.added_token_id(token).is_some();
    // There it ends a message inside an answer, or is left over from another vocabulary; llama.cpp has the same exceptions.
    let inside = |token: &str| match token {
        "<|end|>" => (has("<|return|>") && has("<|call|>")) || (has("<|flush|>") && (has("<|call|>") || has("<|calls|>"))),
        "</s>" => has("<|tool_response>"),
        _ => false,
    };
    let known = KNOWN.iter().filter(|token| !inside(token)).filter_map(|token| tokenizer.added_token_id(token));
    let mut ends = Vec::new();
    for id in named.into_iter().chain(known) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Vocabulary;

    /// Ids from 2 on are `tokens`, all of one type: 1 is plain text, 3 a control token, 4 a user-defined one.
    fn ends(tokens: &[&str], kind: u32, named: &[u32]) -> Vec<u32> {
        let tokens: Vec<String> = ["a", "b"].iter().chain(tokens).map(ToString::to_string).collect();
        let token_types = (0..tokens.len()).map(|id| if id < 2 { 1 } else { kind }).collect();
        let vocabulary = Vocabulary { tokens, token_types, pre: Some("gpt-2".into()), ..Vocabulary::default() };
        end_tokens(&Tokenizer::from_vocabulary(&vocabulary).unwrap(), named.iter().copied())
    }

    #[test]
    fn an_end_of_turn_ends_an_answer_though_the_checkpoint_names_another_token() {
        for (tokens, kind, named, expected) in [
            // ChatML on a base whose end of text it kept (Qwen2, Hermes), as control tokens and as added ones.
            (&["<|endoftext|>", "<|im_start|>", "<|im_end|>"][..], 3, &[2][..], &[2, 4][..]),
            (&["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 4, &[2], &[2, 4]),
            (&["<|im_end|>", "<|endoftext|>"], 3, &[3], &[3, 2]),
            // Llama 3: three ends, of which GGUF files name one or two.
            (&["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>"], 3, &[2], &[2, 4, 3]),
            (&["<eos>", "<start_of_turn>", "<end_of_turn>"], 3, &[2], &[2, 4]),
            (&["<|user|>", "<|end|>"], 3, &[], &[3]),
            // gpt-oss: a message ends with <|end|>, and the answer goes on.
            (&["<|end|>", "<|return|>", "<|call|>"], 3, &[3], &[3, 4]),
            (&["<|end|>", "<|flush|>", "<|calls|>"], 3, &[3], &[3, 4]),
            (&["</s>", "<turn|>", "<|tool_response>"], 3, &[3], &[3, 4]),
            // Plain text that looks like one.
            (&["</s>", "<EOT>"], 1, &[], &[]),
            (&["<|im_start|>"], 3, &[2, 2], &[2]),
        ] {
            assert_eq!(ends(tokens, kind, named), expected, "{tokens:?} {kind}");
        }
    }
}
