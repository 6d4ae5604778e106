"""The maths of the methods as plain torch modules."""
