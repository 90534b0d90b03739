"""How prompts are drawn: their texts and their lengths."""
