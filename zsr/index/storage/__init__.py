"""The files of an index: embeddings that it is built from, id map, inverted lists, segments."""
