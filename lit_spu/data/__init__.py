"""Examples from files, the hub or a generator, as batches of tokens."""
