"""Files of an index: the embeddings it is built from, id map, inverted lists, segments."""
