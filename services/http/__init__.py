"""Routes, request bodies and the bytes of answers."""
