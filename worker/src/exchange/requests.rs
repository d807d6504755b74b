//! Many sequences in requests that a pool accepts.

use carryon_crds::wire::Limits;

/// `sequences` in their order, cut into requests within the pool's limits; one that is too long alone is left to the pool to refuse.
pub fn within(sequences: Vec<Vec<u32>>, limits: &Limits) -> Vec<Vec<Vec<u32>>> {
    let mut requests: Vec<Vec<Vec<u32>>> = Vec::new();
    let mut tokens = 0;
    for sequence in sequences {
        let full = tokens + sequence.len() > limits.max_request_tokens as usize;
        match requests.last_mut() {
            Some(request) if !full && request.len() < limits.max_sequences as usize => {
                tokens += sequence.len();
                request.push(sequence);
            }
            _ => {
                tokens = sequence.len();
                requests.push(vec![sequence]);
            }
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(sequences: &[usize], max_sequences: u32, max_request_tokens: u32) -> Vec<Vec<usize>> {
        let limits =
            Limits { max_model_len: 100, max_sequences, max_request_tokens, max_body_bytes: 1, max_num_seqs: None, max_head_bytes: None };
        let sequences = sequences.iter().map(|&length| vec![0; length]).collect();
        within(sequences, &limits).iter().map(|request| request.iter().map(Vec::len).collect()).collect()
    }

    #[test]
    fn requests_stay_within_the_pool_s_limits_and_keep_the_order() {
        assert_eq!(lengths(&[4, 6, 1, 1, 1, 1, 12, 2], 3, 10), [vec![4, 6], vec![1, 1, 1], vec![1], vec![12], vec![2]]);
        assert_eq!(lengths(&[1, 1, 1, 5, 2, 6], 2, 6), [vec![1, 1], vec![1, 5], vec![2], vec![6]]);
    }
}
