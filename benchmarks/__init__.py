"""What each method costs against full fine-tuning and a plain forward pass, and what the data pipeline gives."""
