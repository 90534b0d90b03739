"""One request: written to a socket, its answer stamped frame by frame."""
