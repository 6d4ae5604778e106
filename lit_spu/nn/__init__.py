"""Layers of the methods as plain torch modules."""
