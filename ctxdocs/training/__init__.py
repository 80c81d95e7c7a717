"""Training: for now the script that makes the bundled model."""
