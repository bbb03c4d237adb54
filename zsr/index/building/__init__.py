"""Build an index: choose its kind, train, add, merge, tune, verify, publish."""
