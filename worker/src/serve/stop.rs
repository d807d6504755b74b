//! Stop strings: found wherever they begin and end, and never shown in part.

/// Passes text on until a stop string comes. The stop string that is complete first ends the text, so the result does not
/// depend on how the text is cut into pieces.
#[derive(Debug, Default)]
pub(super) struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for non-empty strings.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Whether a stop string has come.
    pub(super) fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text that can be shown now.
    pub(super) fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        if let Some((_, start)) = found.min() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let held = self.held.len() - self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(held);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back when the text ends by itself.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that a stop string begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(at, _)| at).rev();
    ends.filter(|length| *length > 0).find(|length| text.ends_with(&stop[..*length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut shown: Vec<String> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        shown.push(matcher.finish());
        (shown, matcher.stopped())
    }

    #[test]
    fn cuts_at_the_stop_string_and_never_shows_a_part_of_it() {
        for (stops, given, expected, stopped) in [
            (&["END"][..], &["a EN", "D b"][..], &["a ", "", ""][..], true),
            (&["END"], &["a EN", "d"], &["a ", "ENd", ""], false),
            (&["END"], &["a E"], &["a ", "E"], false),
            (&["\n\n"], &["x\n", "\n", "y"], &["x", "", "", ""], true),
            (&["abcd", "bc"], &["abcd"], &["a", ""], true),
            (&["aab"], &["aa", "ab"], &["", "a", ""], true),
            (&["🙂!"], &["é🙂", "!"], &["é", "", ""], true),
            (&[], &["a", "b"], &["a", "b", ""], false),
        ] {
            assert_eq!(pieces(stops, given), (expected.iter().map(ToString::to_string).collect(), stopped), "{stops:?} {given:?}");
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_pieces() {
        let (text, stops) = ("xabababc🙂abcabdy", ["ababc🙂a", "abd", "🙂b"]);
        let whole = pieces(&stops, &[text]).0.concat();
        for cut in (0..=text.len()).filter(|cut| text.is_char_boundary(*cut)) {
            for second in (cut..=text.len()).filter(|second| text.is_char_boundary(*second)) {
                let shown = pieces(&stops, &[&text[..cut], &text[cut..second], &text[second..]]);
                assert_eq!(shown.0.concat(), whole, "{cut} {second}");
            }
        }
        assert_eq!(whole, "xab");
    }
}
