"""The few ways a memory touches an unmodified Hugging Face model."""
