"""Execution: stored forms of a weight, the kernels that multiply them, and the choice between those by measurement."""
