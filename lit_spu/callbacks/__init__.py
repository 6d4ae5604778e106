"""What watches a run: each works on any LightningModule, and what it found is in its `summary` at any time."""
