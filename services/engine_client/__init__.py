"""How the API reaches the engine, and the process that runs it."""
