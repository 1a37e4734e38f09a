"""A small language model that every machine can train: source code in, a transformers directory out."""
