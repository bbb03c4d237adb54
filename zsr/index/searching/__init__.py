"""Search: one index, shards of it on many machines, batches of queries; and what is written of the results."""
