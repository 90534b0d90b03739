"""Model backends: token ids in, token ids out, without HTTP and without a batching strategy."""
