"""The wire contract: what a client may send and what it gets back. Imports nothing of ours.

Import from the modules: the engine's process needs `timings` alone, and the rest loads pydantic (20 MB).
"""
