"""Examples of a task, from their source to batches of tokens."""
