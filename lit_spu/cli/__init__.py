"""The command line `lit-spu`."""
