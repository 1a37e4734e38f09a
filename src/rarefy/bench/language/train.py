"""Trains the language model that pruning is judged on: a Llama of 6.9 million parameters, in an hour on two cores.

    python -m rarefy.bench.language train OUT

OUT becomes an ordinary transformers directory: safetensors, config, and a byte-level BPE tokenizer trained here.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rarefy.bench.language.corpus import Corpus
from rarefy.bench.perplexity import perplexity
from rarefy.bench.seeds import generator

__all__ = ["Recipe", "held_out_loss", "make_tokenizer", "train"]

Progress = Callable[[int, int, str], None]
START = "<|start|>"


@dataclass(frozen=True)
class Recipe:
    """What is trained and how. minutes: training stops there, its learning rate at its end by then. steps: how many,
    whatever the clock says."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 8
    heads: int = 8
    key_heads: int = 4
    hidden: int = 688
    context: int = 256
    batch: int = 8
    rate: float = 2e-3
    minutes: float = 50.0
    steps: int | None = None
    seed: int = 0


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer, as transformers' fast ones are: every text can be told by it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=START, eos_token=START)


def make_model(recipe: Recipe) -> Any:
    """The Llama of a recipe, its first weights drawn from the seed; the global generator stays where it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.width, intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.key_heads,
        max_position_embeddings=2 * recipe.context, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def train(corpus: Corpus, out: Path, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Train, write OUT, and return what happened: tokens, seconds, the loss on held-out text (nats per token)."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: give another folder for the model")
    progress(0, 100, "tokenizer")
    tokenizer = make_tokenizer((corpus.text("train"),), recipe.vocabulary)
    ids = _tokens(tokenizer, corpus.text("train"))
    judged = _tokens(tokenizer, corpus.text("judged"))
    model = make_model(recipe)
    steps, seconds = _fit(model, ids, recipe, progress)
    loss = held_out_loss(model, judged, recipe.context)
    said = {
        "recipe": asdict(recipe), "corpus": corpus.digest(), "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps, "tokens": steps * recipe.batch * recipe.context, "seconds": round(seconds),
        "held_out_loss": round(loss, 4), "held_out_perplexity": round(math.exp(loss), 3),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(said, indent=1) + "\n")
    return said


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int32)


def _fit(model: Any, ids: Tensor, recipe: Recipe, progress: Progress) -> tuple[int, float]:
    """AdamW, a warm-up of 2 % and a cosine to a tenth, both over the time there is; matrices in bfloat16."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95))
    source = generator("language batches", recipe.seed)
    begun, limit = time.monotonic(), 60 * recipe.minutes
    model.train()
    for step in itertools.count():
        passed = (time.monotonic() - begun) / limit if recipe.steps is None else step / recipe.steps
        if passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (passed + 1e-3) / 0.02) * (0.55 + 0.45 * math.cos(math.pi * passed))
        first = torch.randint(0, len(ids) - recipe.context, (recipe.batch, 1), generator=source)
        batch = ids[first + torch.arange(recipe.context)].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(int(100 * passed), 100, f"step {step}, loss {loss.item():.2f}")
    model.eval()
    return step, time.monotonic() - begun


def held_out_loss(model: Any, ids: Tensor, context: int, windows: int = 400) -> float:
    """Nats per token over the first windows of so many tokens, each judged without what stood before it."""
    whole = ids[: len(ids) // context * context].view(-1, context)[:windows].long()
    return fmean(perplexity(model, whole).nll_per_window)
