"""Steps on a CUDA device: overlapped, as graphs, sampled where the logits are."""
