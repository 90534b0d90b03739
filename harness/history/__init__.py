"""Results of many commits in one folder: the store, its change points, its page and its series."""
