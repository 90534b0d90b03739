"""A local page over a folder of results: list, filter, compare, open reports; it reads and never writes."""
