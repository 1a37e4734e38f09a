import multiprocessing
import threading
import warnings

import pytest
import torch

from rarefy.runtime import pack, warn
from runtime.nets import have_kernels, mlp, thin
from runtime.test_layers import inputs

pytestmark = [
    pytest.mark.usefixtures("no_cache"),
    pytest.mark.skipif(not have_kernels(), reason="there is nothing to choose from without compiled kernels"),
    pytest.mark.filterwarnings("ignore:this process has loaded"),  # said once a process, by whichever packs first
]


def test_several_threads_run_one_packed_model(clock):
    clock("bitmap")
    model = thin(mlp(64, 48, 10))
    pack(model, example=inputs(1, 64))
    xs = [inputs(tokens, 64, seed=tokens) for tokens in (1, 4, 9)]
    with torch.no_grad():
        exact = [model(x) for x in xs]
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(100):
                wrong.extend(1 for x, y in zip(xs, exact, strict=True) if not torch.equal(model(x), y))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(model, x, queue):
    with torch.no_grad():
        queue.put(model(x).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_runs_what_was_packed_before(clock):
    clock("bitmap")
    model = thin(mlp(64, 48, 10))
    pack(model, example=inputs(1, 64))
    x = inputs(3, 64)
    with torch.no_grad():
        exact = model(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(model, x, queue))
    child.start()
    found = torch.tensor(queue.get())
    child.join(30)
    assert child.exitcode == 0
    assert torch.equal(found, exact)


def test_a_second_openmp_runtime_is_warned_of(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 123  {}\n"
    maps.write_text(line.format("/site/torch/lib/libgomp-a34b.so.1") * 2 + line.format("/x/libc.so.6"))
    assert warn.openmp_runtimes(maps) == ["libgomp-a34b.so.1"]
    with maps.open("a") as file:
        file.write(line.format("/usr/lib/libiomp5.so") + line.format("/usr/lib/libomp.so.5"))
    assert len(warn.openmp_runtimes(maps)) == 3
    assert warn.openmp_runtimes(tmp_path / "none") == []
    monkeypatch.setattr(warn, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    warn.warn_once.cache_clear()
    warnings.simplefilter("always")
    with pytest.warns(UserWarning, match="2 OpenMP runtimes"):
        warn.warn_once()
    warn.warn_once()  # once
