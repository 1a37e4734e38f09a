"""That pruning a directory takes the memory of the block at work, however many there are, and however many experts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'rarefy[hf]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is resident"),
]

BEGIN = r"""
import ctypes, gc, json, re, sys, threading, time
from pathlib import Path

import torch
import transformers

from rarefy.io.prune import prune
from rarefy.methods import DSnoT, Magnitude, Refit, SparseGPT, Wanda

folder, method, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
METHODS = {
    "Wanda": Wanda(0.5), "SparseGPT": SparseGPT(0.5), "DSnoT": DSnoT(Wanda(0.5)),
    "Magnitude": Magnitude(0.5, allocation="uniform"), "Refit": Refit(Magnitude(0.5, allocation="uniform")),
}
running = True


def anonymous():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def save(name, depth, width, kind="Llama", **sizes):
    sizes = {"intermediate_size": width * 11 // 4, **sizes}
    config = getattr(transformers, kind + "Config")(
        hidden_size=width, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=depth, vocab_size=256,
        max_position_embeddings=128, tie_word_embeddings=False, **sizes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / name)
    return sum(p.nbytes for p in model.model.layers[0].parameters())


def settle():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


data = [torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]
"""

MANY_BLOCKS = (
    BEGIN
    + r"""
save("small", 2, 64)
block = save("model", 14, 512)
prune(folder / "small", folder / "small-out", METHODS[method], calibration=data)  # libraries are loaded
settle()
after = []  # what is held when a block is done; its last entry grows to the most that is held from then on


def done(blocks, of, name):
    gc.collect()
    after.append(anonymous())


def watch():
    while running:
        if len(after) == 15:
            after[-1] = max(after[-1], anonymous())
        time.sleep(0.001)


watching = threading.Thread(target=watch)
watching.start()
prune(folder / "model", folder / "out", METHODS[method], calibration=data, progress=done)
running = False
watching.join()
print(json.dumps([after, block]))
"""
)

MOST = (
    BEGIN
    + r"""
MODELS = {
    "Llama": lambda: save("model", 14, 512),
    "Mixtral": lambda: save("model", 2, 32, "Mixtral", num_local_experts=16, intermediate_size=1024),
}
block = MODELS[sys.argv[4]]()
prune(folder / "model", folder / "first", METHODS[method], calibration=data)  # torch keeps code for every shape
settle()
before = most = anonymous()


def watch():
    global most
    while running:
        most = max(most, anonymous())
        time.sleep(0.001)


watching = threading.Thread(target=watch)
watching.start()
prune(folder / "model", folder / "out", METHODS[method], calibration=data)
running = False
watching.join()
print(json.dumps([most - before, block]))
"""
)


def run(script: str, *arguments: str) -> Any:
    said = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["Wanda", "SparseGPT", "DSnoT", "Refit"])
def test_finished_blocks_take_no_memory(tmp_path: Path, method: str, dtype: str):
    after, block = run(MANY_BLOCKS, str(tmp_path), method, dtype)
    assert len(after) == 15
    assert after[13] < after[1] + block  # after thirteen blocks and after one
    assert after[14] < after[13] + 4 * block  # while masks take effect and files are written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["SparseGPT", "Refit"])
def test_gram_matrices_of_experts_are_not_held_together(tmp_path: Path, method: str, dtype: str):
    grown, block = run(MOST, str(tmp_path), method, dtype, "Mixtral")
    gram, tokens = 4 * 1024**2, 4 * 2 * 64
    activations = 4 * tokens * (32 + 2 * (32 + 1024))  # states, and what two experts a token read
    model = 2 * block  # stacked on loading, so no map of its files
    assert grown < model + 2 * block + 3 * gram + activations + 12 * 2**20  # sixteen matrices would be 64 MB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_method_without_data_takes_the_memory_of_a_block_too(tmp_path: Path, dtype: str):
    grown, block = run(MOST, str(tmp_path), "Magnitude", dtype, "Llama")
    assert grown < 2 * block + 6 * 2**20  # fourteen blocks, and their masks, would be seventeen to twenty-one
