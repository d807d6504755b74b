//! The head: bridge, blocks, gate, LM-head loss, artifact.
