"""Run directories, trained weights as files, and fingerprints of weights."""
