"""Results that no training made, for tests of what is done with results."""

from typing import Any

from rarefy.bench.environment import Environment
from rarefy.bench.results import Control, Flops, Result, RunSection, TrainSection, key_of

ENVIRONMENT = Environment(
    rarefy="0.1.0",
    code="c0de",
    python="3.11",
    torch="2.13",
    numpy="2.4",
    system="Linux",
    machine="x86_64",
    processor="a processor",
    instructions="AVX2",
    cores=2,
    device="cpu",
    threads=1,
    flush_denormal=True,
)
LABELS = {"dense": ["static", "dense", "real"], "rigl": ["dynamic", "sparse-to-sparse", "simulated"]}


def result(
    name: str = "random",
    accuracy: float = 95.0,
    *,
    seed: int = 0,
    sparsity: float = 0.9,
    control: Control = "none",
    kept: int = 10,
    training: float = 300.0,
    task: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    environment: Environment = ENVIRONMENT,
    **train: Any,
) -> Result:
    """A result on the digits; `train` replaces fields of the section of that name."""
    run = RunSection(
        task=task or {"kind": "Digits", "steps": 1500, "batch": 64, "every": 50, "judge": "test"},
        name=name,
        sparsity=0.0 if name == "dense" and control != "small_dense" else sparsity,
        seed=seed,
        control=control,
        steps=1500,
        judge="test",
        data="da7a",
    )
    method = method or {"kind": name, "sparsity": sparsity}
    kept = 100 if name == "dense" else kept
    section = TrainSection(
        accuracy=accuracy,
        judged=597,
        labels=LABELS.get(name, ["static", "sparse-to-sparse", "simulated"]),
        sites="51735",
        prunable=100,
        nonzeros=kept,
        kept={"fc": kept},
        parameters=110,
        parameters_nonzero=kept + 10,
        bytes=100,
        average_parameters=float(kept),
        explored=0.1,
        flip_rate=0.0,
        flops=_flops(training),
        masks="0" * 64,
        train_accuracy=99.0,
        wall_seconds=1.5,
    ).model_copy(update=train)
    return Result(key=key_of(run, method, environment), run=run, method=method, train=section, environment=environment)


def _flops(training: float) -> Flops:
    return Flops(
        formula="rigl-appendix-2mac",
        text="2·MAC",
        inference=20.0,
        inference_dense=200.0,
        training=training,
        training_dense=3000.0,
        scoring=0.0,
    )
