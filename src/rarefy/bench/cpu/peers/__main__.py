"""`python -m rarefy.bench.cpu.peers install DIR`, the same as `python -m rarefy.bench.cpu peers install DIR`."""

from rarefy.bench.cpu.__main__ import main

if __name__ == "__main__":
    main(["peers", *__import__("sys").argv[1:]])
