"""The torch backend: any supported Hugging Face causal LM as one batched step function."""
