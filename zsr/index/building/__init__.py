"""Build an index: choose the index key, train, add, merge, tune, verify, publish."""
