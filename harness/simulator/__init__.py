"""A fleet on a virtual clock: the lab's own engines, strategies and load generator, with a model of time."""
