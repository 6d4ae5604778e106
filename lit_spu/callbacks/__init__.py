"""Callbacks that watch or steer a run, for any LightningModule; their results so far are in their `summary`."""
