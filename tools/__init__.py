"""Tools of development, which are not part of the package."""
