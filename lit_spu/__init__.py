"""Fine-tune pretrained transformers for little memory and time."""
