"""One forward pass over packed rows: attention, KV slots, linear layers, Llama's shape."""
