"""Models as files: found, made from a seed, fetched, converted, checked."""
