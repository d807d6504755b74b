//! `carryon-worker train`: the trainer pod.
