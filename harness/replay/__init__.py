"""One schedule played against one server, from its start to its last answer."""
