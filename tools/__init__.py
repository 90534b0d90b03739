"""Commands that people run: the `lab` program and the makers of prompts and models."""
