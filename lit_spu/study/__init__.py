"""Methods beside one another: what each would take, and what each came to."""
