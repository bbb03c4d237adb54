"""Change an index that is published: add, delete, rebuild, compact, purge."""
