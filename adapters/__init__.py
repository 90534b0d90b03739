"""Model backends: token ids in, token ids out. Knows no HTTP and no batching strategy."""
