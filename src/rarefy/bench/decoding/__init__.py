"""Decoding with a sparse Llama of 1.1 thousand million parameters: what it gains, and what it costs in perplexity."""
