"""Where the time of a step goes: its parts in the torch backend, the adapter around llama.cpp."""
