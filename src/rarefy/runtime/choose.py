"""The measured choice: which form and which algorithms run a layer fastest, here, at the shapes of the example.

The cost model leaves out what cannot win; the rest is timed beside torch (and our own dense kernels) on the layer's own
weight. Times are kept by problem: layers of one shape, density, dtype and input are measured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from rarefy.runtime import conv, cost, kernels, measure
from rarefy.runtime.cache import Cache
from rarefy.runtime.candidates import AS_IT_IS, KINDS, Calls, Storage, conv_calls, fits, linear_calls, storages_of
from rarefy.runtime.conv import Geometry
from rarefy.runtime.find import Layer, Seen
from rarefy.runtime.kernels import DType, Form
from rarefy.runtime.report import Candidate
from rarefy.runtime.ways import TORCH, Table, Way

_MEASURED = 4  # candidates of the cost model's that are timed, for each number of tokens
_CALL = 1e-6  # seconds by which a call of a kernel may lose to torch's
_ALIKE = 1.03


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer. form None: it stays as it is, or (table given) our dense kernels read its parameter.

    way: of a convolution. before, after: seconds over all calls of the examples.
    """

    form: Form | None = None
    block: int = 1
    table: Table | None = None
    way: str | None = None
    candidates: tuple[Candidate, ...] = ()
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        if self.way is not None and self.form is not None:
            block = f" {self.block}×1" if self.block > 1 else ""
            return f"{'index' if self.form == Form.INDEX16 else self.form.name.lower()}{block}, {self.way}"
        if self.table is None:
            return "torch"
        return " / ".join(dict.fromkeys(AS_IT_IS if w.algorithm == TORCH else str(w) for w in self.table))


class Chooser:
    """Chooses for one model: threads, caches and memory are the same for all its layers."""

    def __init__(self, cache: Cache, *, threads: int, cold: bool, memory: str = "size") -> None:
        self.cache, self.threads, self.cold = cache, threads, cold
        self.memory = memory

    def choose(self, layer: Layer, dtype: DType) -> Decision:
        """The decision for a layer, stored in dtype (its own, unless weights are cast or quantised)."""
        if not layer.seen:
            return Decision()
        geometry = layer.geometry
        return self._linear(layer, dtype) if geometry is None else self._conv(layer, geometry, dtype)

    # -- linear --------------------------------------------------------------------------------------------------

    def _linear(self, layer: Layer, dtype: DType) -> Decision:
        storages = storages_of(layer, dtype)
        seen = _by_bucket(layer.seen)
        times = {bucket: self._times(layer, each, dtype, storages) for bucket, each in seen.items()}
        candidates = tuple(
            Candidate(name, seen[bucket].tokens, taken, True) for bucket, found in times.items()
            for name, taken in sorted(found.items(), key=lambda item: item[1])
        )  # fmt: skip
        before = sum(seen[bucket].calls * found[AS_IT_IS] for bucket, found in times.items())
        calls = sum(each.calls for each in seen.values())
        made = [self._decision(layer, storage, storages, seen, times, dtype) for storage in storages]
        found = [
            (d, storage) for d, storage in zip(made, storages, strict=True) if d is not None and d.after is not None
        ]
        least = min((cast(float, d.after) for d, _ in found), default=math.inf)
        if least >= before + _CALL * calls:
            return Decision(before=before, after=before, candidates=candidates)
        # Of those that are as fast as can be told apart, the one that takes least memory.
        alike = [(d, s) for d, s in found if cast(float, d.after) <= _ALIKE * least + _CALL / 5 * calls]
        best, _ = min(
            alike, key=lambda pair: cost.stored_bytes(pair[1].form, self._sizes(layer, pair[1].kept, dtype, 1))
        )
        return replace(best, candidates=candidates, before=before)

    def _decision(
        self,
        layer: Layer,
        storage: Storage,
        storages: Sequence[Storage],
        seen: dict[int, Seen],
        times: dict[int, dict[str, float]],
        dtype: DType,
    ) -> Decision | None:
        """What this form can do: the fastest way of each bucket. None where it has no way for some bucket."""
        own = storage.form == Form.DENSE and dtype == KINDS[layer.weight.dtype] and layer.weight.dtype != torch.float16
        ways = list(storage.ways)
        if self.memory == "speed" and storage.form != Form.DENSE:
            ways = [way for each in storages if each.form != Form.DENSE for way in each.ways]
        table: list[Way] = []
        after = 0.0
        for bucket in range(kernels.BUCKETS):
            taken = times.get(bucket, {})
            names = {way: AS_IT_IS if own and way.algorithm == TORCH else str(way) for way in ways}
            found = {way: taken[name] for way, name in names.items() if name in taken}
            if bucket in seen and not found:
                return None
            # A kernel that is hardly slower than torch is taken: a plan saves its call, and the whole model is judged.
            fastest = min(found, key=lambda w: found[w] + _CALL * (w.algorithm == TORCH), default=None)
            way = self._predicted(layer, storage, bucket, dtype, own) if fastest is None else fastest
            if way is None:
                return None
            table.append(way)
            after += seen[bucket].calls * found[way] if found else 0.0
        if own and all(way.algorithm == TORCH for way in table):
            return None  # that is the layer as it is
        return Decision(None if own else storage.form, storage.block, tuple(table), after=after)

    def _predicted(self, layer: Layer, storage: Storage, bucket: int, dtype: DType, own: bool) -> Way | None:
        """For a bucket that no example has: torch where the layer stays dense, else by the cost model."""
        if own:
            return Way(Form.DENSE, TORCH)
        tokens = (1, 4, 16, 64, 256)[bucket]
        ways = [way for way in storage.ways if fits(way, tokens)]
        sizes = self._sizes(layer, storage.kept, dtype, tokens)
        return min(ways, key=lambda way: cost.seconds(way, sizes), default=None)

    def _sizes(self, layer: Layer, kept: int, dtype: DType, tokens: int) -> cost.Sizes:
        rows, cols = layer.weight.shape
        return cost.Sizes(rows, cols, kept, dtype, tokens, self.threads, self.cold)

    def _times(self, layer: Layer, seen: Seen, dtype: DType, storages: Sequence[Storage]) -> dict[str, float]:
        """Measured seconds, by the names of ways; AS_IT_IS is always among them."""
        wanted = self._wanted(layer, seen, dtype, storages)
        key = self._key(layer, seen, dtype)

        def make(missing: Iterable[str]) -> Calls:
            return linear_calls(layer, seen, dtype, [way for way in wanted if str(way) in set(missing)], cold=self.cold)

        return self._measured(key, [AS_IT_IS, *map(str, wanted)], make)

    def _wanted(self, layer: Layer, seen: Seen, dtype: DType, storages: Sequence[Storage]) -> list[Way]:
        """The most promising ways, sparse and dense; torch's own beside them only where it is another dtype."""
        predicted: dict[Way, float] = {}
        dense: dict[Way, float] = {}
        for storage in storages:
            sizes = self._sizes(layer, storage.kept, dtype, seen.tokens)
            for way in storage.ways:
                if fits(way, seen.tokens):
                    (dense if storage.form == Form.DENSE else predicted)[way] = cost.seconds(way, sizes)
        best = sorted(predicted, key=lambda way: predicted[way])[:_MEASURED]
        return best + [way for way in dense if way.algorithm != TORCH or dtype != KINDS[layer.weight.dtype]]

    # -- convolutions --------------------------------------------------------------------------------------------

    def _conv(self, layer: Layer, geometry: Geometry, dtype: DType) -> Decision:
        """Sparse forms beside torch; what has no kernel here drops out when it is first called."""
        storages = [s for s in storages_of(layer, dtype) if s.form not in (Form.DENSE, Form.LUT)]
        names = {
            f"{s.form.name} {s.block} {way}": (s, way)
            for s in storages for way in conv.ways(geometry, s.form, s.block, dtype)
        }  # fmt: skip
        seen = max(layer.seen, key=lambda each: each.calls * each.tokens)

        def make(missing: Iterable[str]) -> Calls:
            found = {n: names[n] for n in missing if n in names}
            return conv_calls(layer, geometry, seen, dtype, found, cold=self.cold)

        times = self._measured(self._key(layer, seen, dtype), [AS_IT_IS, *names], make)
        before = times[AS_IT_IS]
        candidates = tuple(
            Candidate(n.lower(), seen.tokens, t, True) for n, t in sorted(times.items(), key=lambda item: item[1])
        )
        best = min(times, key=lambda name: times[name])
        if best == AS_IT_IS:
            return Decision(candidates=candidates, before=before, after=before)
        storage, way = names[best]
        return Decision(storage.form, storage.block, None, way, candidates, before, times[best])

    # -- measuring -----------------------------------------------------------------------------------------------

    def _measured(self, key: str, names: Sequence[str], make: Callable[[Iterable[str]], Calls]) -> dict[str, float]:
        """Times from the cache, or taken now: all together, since only what is interleaved can be compared."""
        known = self.cache.find(key)
        if not all(name in known for name in names):
            with torch.no_grad():
                known = measure.times(make(names), cold=self.cold)
            self.cache.keep(key, known)
        return {name: known[name] for name in names if name in known}

    def _key(self, layer: Layer, seen: Seen, dtype: DType) -> str:
        rows, cols = layer.weight.shape
        geometry = layer.geometry
        kind = "linear" if geometry is None else "conv " + ",".join(map(str, (*geometry, *seen.shape)))
        blocks = ",".join(f"{block}:{stored / (rows * cols):.2f}" for block, stored in sorted(layer.blocks.items()))
        weight, given = (str(d).removeprefix("torch.") for d in (layer.weight.dtype, seen.dtype))
        order = " feature-major" if seen.feature_major else ""
        bias = "" if layer.bias is None else " bias"
        return (
            f"{kind} {rows}×{cols} kept {blocks} {weight} as {dtype.name} tokens {seen.tokens} {given}{order}{bias} "
            f"threads {self.threads} {'cold' if self.cold else 'hot'}"
        )


def _by_bucket(seen: Sequence[Seen]) -> dict[int, Seen]:
    """For each bucket the shape that brings most tokens to the layer, with the calls of all."""
    found: dict[int, Seen] = {}
    for each in sorted(seen, key=lambda s: s.calls * s.tokens):
        bucket = kernels.bucket(each.tokens)
        calls = each.calls + (found[bucket].calls if bucket in found else 0)
        found[bucket] = Seen(each.tokens, each.dtype, each.shape, each.feature_major, calls)
    return found
