//! Texts of others in our messages: what pods, kubelets and schedulers say is as long as they like.

/// Characters of somebody's words in a message of ours.
pub const WORDS: usize = 512;

/// `text` in one line and `limit` characters at most; an ellipsis says that something was cut off.
pub fn bounded(text: &str, limit: usize) -> String {
    let one_line = |character: char| if character.is_control() { ' ' } else { character };
    let mut characters = text.trim().chars().map(one_line);
    let mut kept: String = characters.by_ref().take(limit).collect();
    if characters.next().is_some() {
        kept.pop();
        kept.push('…');
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::bounded;

    #[test]
    fn a_text_that_is_too_long_ends_in_an_ellipsis() {
        assert_eq!(bounded(" as\tit is\n", 8), "as it is");
        assert_eq!(bounded("as it is!", 8), "as it i…");
        assert_eq!(bounded("größer als", 6), "größe…", "characters, not bytes");
        assert_eq!(bounded("", 6), "");
    }
}
