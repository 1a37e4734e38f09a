"""What pruning a block costs, beside straightforward implementations of the same formulas."""
