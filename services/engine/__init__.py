"""The step loop and its scheduler; knows no HTTP, no process and no backend."""
