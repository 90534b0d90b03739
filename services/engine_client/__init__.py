"""The API's end of the engine, and the process that runs it."""
