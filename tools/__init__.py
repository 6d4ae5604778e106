"""Things that are run once, by hand."""
