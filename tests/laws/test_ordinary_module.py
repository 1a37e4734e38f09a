"""Law 6: at every step a sparsified model is an ordinary module: to copy, save, pickle, compile and export."""

import copy
import gc
import pickle
import shutil
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import rarefy
from laws.training import (
    OPTIMIZERS,
    STEPS,
    TRAINING,
    VARIANTS,
    Run,
    batch,
    begin,
    differences,
    loss_of,
    model_of,
    small,
)

MANY = [*TRAINING, *VARIANTS, "Magnitude"]


@pytest.fixture(autouse=True)
def _no_compiled_code_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hooks_of(model: nn.Module) -> list[Any]:
    """Whatever hangs on modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    found = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    for p in model.parameters():
        found += [*(p._post_accumulate_grad_hooks or {}).values(), *(p._backward_hooks or {}).values()]
    return found


def train_freely(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()


def zeros(model: nn.Module, handle: rarefy.Sparsity) -> int:
    weights = dict(model.named_parameters())
    return sum(int((weights[name][~mask] == 0).sum()) for name, mask in handle.masks.items())


@pytest.mark.parametrize("name", MANY)
def test_copies_and_pickles_are_plain_models_after_every_step(name: str):
    plain = model_of()
    run = begin(small(name), OPTIMIZERS["SGD"])
    for step in range(13):
        run.train(step)
        for copied in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):  # noqa: S301
            assert list(copied.state_dict()) == list(plain.state_dict())
            assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()]
            assert not differences(copied.state_dict(), run.model.state_dict())
            assert hooks_of(copied) == []


def test_a_copy_trains_freely():
    run = begin(rarefy.Random(0.75), OPTIMIZERS["SGD"]).train(3)
    copied = copy.deepcopy(run.model)
    masked = zeros(run.model, run.handle)
    train_freely(copied)
    assert zeros(copied, run.handle) < masked / 2
    assert zeros(run.model, run.handle) == masked
    alone = begin(rarefy.Random(0.75), OPTIMIZERS["SGD"]).train(6)
    run.train(6)
    assert not differences(run.model.state_dict(), alone.model.state_dict())


@pytest.mark.parametrize("name", ["RigL", "SRSTE"])
def test_a_loaded_state_dict_makes_the_same_model(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(7)
    other = model_of(seed=4)
    other.load_state_dict(run.model.state_dict())
    other.eval(), run.model.eval()
    assert torch.equal(other(batch(0)[0]), run.model(batch(0)[0]))


def test_a_copied_optimizer_is_a_plain_one():
    run = begin(small("RigL"), OPTIMIZERS["AdamW"]).train(3)
    model, optimizer = copy.deepcopy((run.model, run.optimizers[0]))
    loaded = pickle.loads(pickle.dumps(run.optimizers[0]))  # noqa: S301
    for each in (optimizer, loaded):
        assert not each._optimizer_step_pre_hooks
        assert not each._optimizer_step_post_hooks
    masked = zeros(run.model, run.handle)
    Run(model, (optimizer,), step=3).train(5)
    assert zeros(model, run.handle) < masked
    assert run.handle.step == 3


# -- compiled --------------------------------------------------------------------------------------------------------


def compiled_run(name: str, backend: str, steps: int) -> tuple[Run, CompileCounterWithBackend]:
    """Compiled after sparsify; the handle knows nothing of it."""
    counter = CompileCounterWithBackend(backend)
    run = begin(small(name), OPTIMIZERS["SGD"])
    run.model = torch.compile(run.model, fullgraph=True, backend=counter)  # type: ignore[assignment]
    return run.train(steps), counter


@pytest.mark.parametrize("name", MANY)
def test_masks_that_change_recompile_nothing(name: str):
    run, counter = compiled_run(name, "eager", 16)
    assert counter.frame_count == 1
    expected = begin(small(name), OPTIMIZERS["SGD"]).train(16)
    assert all(torch.equal(mask, expected.handle.masks[key]) for key, mask in run.handle.masks.items())
    for key, weight in expected.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[f"_orig_mod.{key}"], weight), key
    rarefy.check(run.handle.model, run.handle)


@pytest.mark.parametrize("name", ["RigL", "SRSTE"])
def test_with_a_backward_graph_too(name: str):
    run, counter = compiled_run(name, "aot_eager", 12)
    assert counter.frame_count == 1
    rarefy.check(run.handle.model, run.handle)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, on importing inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["RigL", "SRSTE", "TopKAST"])
def test_with_generated_code(name: str):
    run, counter = compiled_run(name, "inductor", STEPS)
    assert counter.frame_count == 1
    rarefy.check(run.handle.model, run.handle)
    assert any(entry.flips for entry in run.handle.ledger.entries)


@pytest.mark.parametrize("name", ["RigL", "GMP channel", "SRSTE"])
def test_a_compiled_model_can_be_made_sparse(name: str):
    """Names are those of its state_dict, the masks those of the plain model."""
    model = torch.compile(model_of(), fullgraph=True, backend="eager")
    optimizers = OPTIMIZERS["SGD"](model)
    handle = rarefy.sparsify(model, small(name), optimizer=optimizers, steps=STEPS, seed=3)
    assert set(handle.masks) <= set(model.state_dict())
    Run(model, optimizers, handle).train(12)
    rarefy.check(model, handle)
    expected = begin(small(name), OPTIMIZERS["SGD"]).train(12)
    for key, mask in expected.handle.masks.items():
        assert torch.equal(handle.masks[f"_orig_mod.{key}"], mask)
    saved = handle.state_dict()
    handle.detach()
    rarefy.sparsify(model, small(name), optimizer=optimizers, steps=STEPS, resume=saved)


def test_module_compile_in_place():
    run = begin(small("RigL"), OPTIMIZERS["SGD"])
    run.model.compile(backend="eager")
    expected = begin(small("RigL"), OPTIMIZERS["SGD"]).train(12)
    run.train(12)
    assert all(torch.equal(mask, expected.handle.masks[key]) for key, mask in run.handle.masks.items())
    assert list(run.model.state_dict()) == list(expected.model.state_dict())


# -- exported --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RigL", "SRSTE", "TopKAST", "GMP channel", "Magnitude"])
def test_the_exported_graph_is_the_plain_one(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(6)
    example = (batch(0)[0],)
    plain = torch.export.export(model_of().eval(), example)
    sparse = torch.export.export(run.model.eval(), example)
    assert sparse.graph_module.code == plain.graph_module.code
    assert str(sparse.graph_signature) == str(plain.graph_signature)
    assert sparse.state_dict.keys() == plain.state_dict.keys()
    assert torch.equal(sparse.module()(*example), run.model(*example))


# -- nothing is left behind ------------------------------------------------------------------------------------------


def _gone(*references: "weakref.ref[Any]") -> bool:
    gc.collect()
    return all(reference() is None for reference in references)


@pytest.mark.parametrize("name", ["RigL", "SRSTE", "GMP channel"])
def test_what_nobody_holds_is_freed(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(5)
    parameters = [weakref.ref(p) for p in run.model.parameters()]
    others = [weakref.ref(run.model), weakref.ref(run.optimizers[0]), weakref.ref(run.handle)]
    del run
    assert _gone(*parameters, *others)


def test_a_handle_lives_as_long_as_its_optimizer():
    model = model_of()
    optimizer = OPTIMIZERS["SGD"](model)[0]
    rarefy.sparsify(model, rarefy.Random(0.75), optimizer=optimizer)
    gc.collect()
    before = [(p == 0) for p in model.parameters()]
    Run(model, (optimizer,)).train(3)
    assert all(bool((p[zero] == 0).all()) for p, zero in zip(model.parameters(), before, strict=True) if p.ndim == 2)


def test_a_model_outlives_its_run():
    """A run in a function that has returned: the model is plain again, and the next run may begin."""

    def first(model: nn.Module) -> None:
        optimizers = OPTIMIZERS["SGD"](model)
        handle = rarefy.sparsify(model, small("RigL"), optimizer=optimizers, steps=STEPS)
        Run(model, optimizers, handle).train(3)

    model = model_of()
    first(model)
    gc.collect()
    assert hooks_of(model) == []
    first(model)
    second = OPTIMIZERS["SGD"](model)
    rarefy.sparsify(model, rarefy.Magnitude(0.5), optimizer=second)  # no collection in between


@pytest.mark.parametrize("way", ["detach", "end"])
@pytest.mark.parametrize("name", MANY)
def test_nothing_hangs_on_model_or_optimizer_afterwards(name: str, way: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(5)
    getattr(run.handle, way)()
    assert hooks_of(run.model) == []
    optimizer = run.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train(6)
    assert all(bool(p.grad.ne(0).any()) for p in run.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_the_gradient_of_an_untouched_loop_is_masked_only():
    """What the hooks do to `.grad`: nothing but zeros where the mask is false, outside of update steps."""
    run = begin(rarefy.Random(0.75), OPTIMIZERS["SGD"])
    plain = model_of()
    plain.load_state_dict(run.model.state_dict())
    for model in (plain, run.model):
        loss_of(model, batch(0)).backward()
    masks = run.handle.masks
    for (name, p), q in zip(run.model.named_parameters(), plain.parameters(), strict=True):
        expected: Tensor = q.grad if name not in masks else q.grad * masks[name]
        assert torch.equal(p.grad, expected)
