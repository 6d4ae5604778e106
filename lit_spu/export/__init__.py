"""Loading of trained methods, and export for other tools."""
