//! The protocol between pools and their clients: wire types, client, cache.
