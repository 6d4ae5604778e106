"""Callbacks that measure or change a run; many have a `summary` of their results so far."""
