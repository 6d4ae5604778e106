"""Compare the costs of all methods with full fine-tuning and a forward pass, and measure the data pipeline."""
