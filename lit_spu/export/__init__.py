"""Trained methods: load them, and write them for other tools."""
