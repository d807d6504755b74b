//! `carryon-worker serve`: the gateway pod.
