"""The model that comes with the package: weights, tokenizer and model card in `bundled/`."""
