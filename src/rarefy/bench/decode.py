"""How fast a language model reads and writes text on this machine: dense against packed, in one process, interleaved.

Two rows are the model's own: `generate`, end to end, one sequence with its cache of keys and values (seconds per token
after the first), and one pass over a prompt (prefill). Below each stands what the packed layers alone take: they are
called one after the other on the inputs that they have in the model. The difference is transformers' own work:
attention, norms, Python.

Token ids are drawn at random from the vocabulary: how long a step takes does not depend on what is said.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.cpu.timing import Samples, paired_ratio
from rarefy.bench.sides import Sides, weight_bytes
from rarefy.runtime import PackReport, pack, unpack

__all__ = ["Decoding", "Timed", "decode_speed"]

Progress = Callable[[int, int, str], object]
Take = Callable[[], float]
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Timed:
    """One row. dense, packed: median seconds over rounds, per token for `unit` "token", else for all tokens together.

    ratio, low, high: median of dense / packed over rounds, each a pair, with the 95 % interval of that median.
    """

    name: str
    unit: str
    tokens: int
    dense: float
    packed: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Decoding:
    """What was measured. bytes_dense, bytes_packed: of all weights that a token needs, read once each."""

    rows: tuple[Timed, ...]
    bytes_dense: int
    bytes_packed: int
    packed_layers: int
    prompt: int
    tokens: int
    threads: int
    dtype: str
    quantize: str | None
    report: PackReport = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what was chosen for each layer under `packing`."""
        found = {name: x for name, x in vars(self).items() if name not in ("rows", "report")}
        return {**found, "rows": [asdict(row) for row in self.rows], "packing": self.report.to_dict()}


def decode_speed(
    model: nn.Module,
    *,
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 9,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Decoding:
    """Pack a causal language model of transformers for batch 1, in place, and time it dense and packed.

    Args:
        prompt: tokens in the prompt. tokens: that are generated after the first. rounds: of each measurement.
        dtype: casts the whole model first, so that both sides compute in it.
        quantize: "int8" for the packed side; the dense side stays as it is.
        threads: of the processor; by default what torch uses.

    A packed model is unpacked first, and packed anew for this machine. Raises ValueError for a model that does not
    generate, for a prompt that does not fit its context, and as `rarefy.pack`.
    """
    _refuse(model, prompt, tokens, rounds)
    unpack(model)
    if dtype is not None:
        model.to(dtype)
    model.eval().requires_grad_(False)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        return _measured(model, prompt, tokens, rounds, quantize, threads, progress or (lambda *_: None))
    finally:
        torch.set_num_threads(before)


def _measured(
    model: Any, prompt: int, tokens: int, rounds: int, quantize: str | None, threads: int | None, progress: Progress
) -> Decoding:
    ids = _random_ids(model, prompt)
    step = {"input_ids": ids[:, :1], "use_cache": False}
    read = {"input_ids": ids, "use_cache": True, **_last_logits(model)}
    sides = Sides(model)
    dense = weight_bytes(model)
    report = pack(
        model, example=[step, {**read, "use_cache": False}], counts=[tokens, 1], quantize=quantize, threads=threads,
        progress=progress,
    )  # fmt: skip
    sides.freeze()
    works: list[tuple[str, str, int, Take]] = [
        ("generate, end to end", "token", tokens, lambda: _generated(model, ids, tokens)),
        (f"prefill of {prompt} tokens", "prompt", prompt, lambda: _timed(lambda: model(**read))),
    ]
    if sides.changes:
        for index, example, unit in ((1, step, "token"), (3, read, "prompt")):
            calls = _calls(model, sides, example)
            works.insert(index, ("  inside packed layers", unit, works[index - 1][2], _inside(calls)))
    rows: list[Timed] = []
    with torch.no_grad(), _endless(model):
        for done, (name, unit, count, take) in enumerate(works):
            progress(done, len(works), name.strip())
            rows.append(_row(name, unit, count, _rounds(sides, take, rounds)))
    sides.show(True)
    return Decoding(
        tuple(rows), dense, weight_bytes(model), len(sides.changes), prompt, tokens, report.threads,
        str(ids.new_empty(0, dtype=_dtype(model)).dtype).removeprefix("torch."), quantize, report,
    )  # fmt: skip


def _rounds(sides: Sides, take: Take, rounds: int) -> tuple[Samples, Samples]:
    """Dense and packed, one after the other, which first alternating; one round more to warm up."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for index in range(-1, rounds):
        for packed in (False, True) if index % 2 else (True, False):
            sides.show(packed)
            seconds = take()
            if index >= 0:
                taken[packed].append(seconds)
    return Samples(tuple(taken[False]), 1), Samples(tuple(taken[True]), 1)


def _row(name: str, unit: str, tokens: int, samples: tuple[Samples, Samples]) -> Timed:
    dense, packed = samples
    ratio = paired_ratio(dense, packed)
    return Timed(name, unit, tokens, dense.median, packed.median, ratio.median, ratio.low, ratio.high, ratio.count)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class _Clock:
    """A streamer, as `generate` calls it: notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generated(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds per token after the first."""
    clock = _Clock()  # the prompt is put first, then each token
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, do_sample=False, streamer=clock)
    return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)


def _inside(calls: Sequence[Call]) -> Take:
    def run() -> None:
        for module, args, named in calls:
            module(*args, **named)

    # Often enough that a sample lasts some milliseconds: a small model's layers take microseconds.
    with torch.no_grad():
        run()
        count = max(1, round(5e-3 / max(1e-6, _timed(run))))

    def take() -> float:
        run()
        return _timed(lambda: [run() for _ in range(count)]) / count

    return take


def _calls(model: Any, sides: Sides, example: dict[str, Any]) -> list[Call]:
    """Each call of a unit, in order, with what it is given, in a pass over the example."""
    found: list[Call] = []
    sides.show(False)

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((module, args, dict(named)))

    hooks = [unit.register_forward_pre_hook(note, with_kwargs=True) for unit in sides.units()]
    try:
        with torch.no_grad():
            model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    sides.show(True)
    return found


def _random_ids(model: Any, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(_text_config(model).vocab_size, (1, count), generator=generator)


def _last_logits(model: Any) -> dict[str, int]:
    """As `generate` does: of a prompt the last token's logits alone, where a model can be asked for them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _endless(model: Any) -> Iterator[None]:
    """No token ends what is generated, and nothing is said about it."""
    settings: Any = model.generation_config
    before = settings.eos_token_id, settings.pad_token_id
    settings.eos_token_id, settings.pad_token_id = None, before[1] or 0
    try:
        yield
    finally:
        settings.eos_token_id, settings.pad_token_id = before


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _refuse(model: Any, prompt: int, tokens: int, rounds: int) -> None:
    for name, x in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds)):
        if x < 1:
            raise ValueError(f"--{name} {x}: at least 1 is needed")
    kind = type(model).__name__
    if not getattr(model, "can_generate", lambda: False)() or model.config.is_encoder_decoder:
        raise ValueError(
            f"a {kind} does not write text token by token: decoding is timed for causal language models. For other "
            "models, rarefy.pack(model, example=...) says what it gains on an example of yours."
        )
    longest = getattr(_text_config(model), "max_position_embeddings", None)
    if longest is not None and prompt + tokens + 1 > longest:
        raise ValueError(f"--prompt {prompt} and --tokens {tokens} are more than the context of {longest} tokens")
