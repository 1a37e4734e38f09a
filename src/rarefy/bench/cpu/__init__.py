"""Speed on the processor: sparse against dense and against other libraries, interleaved in one process.

`python -m rarefy.bench.cpu {matrices,models,training,peers}`; each writes one JSON document and prints its tables.
"""
