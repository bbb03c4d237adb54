"""Search: one index, an index sharded over machines, batches of queries; and the result files."""
