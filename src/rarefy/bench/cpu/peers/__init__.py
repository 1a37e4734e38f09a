"""Other libraries, each behind the same small face; none of them is needed to run the benchmarks.

- overlay: packages that run in this process (onnxruntime, sparseprop, llama.cpp), in a folder of their own that is put
  at the end of the module search path: what both have, numpy say, is taken from the environment of rarefy.
- deepsparse: needs older packages, so it has an environment and a process of its own and takes its times itself.
"""
