//! `carryon-worker base`: the pool pod.
