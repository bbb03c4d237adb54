"""Change a published index: add, delete, rebuild, compact, purge."""
