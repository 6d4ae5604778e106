"""Run directories, files of trained weights, and fingerprints of weights."""
