"""Run by test_traced.py in a process of its own: torch.compile and torch.export would trace the run-time type checks of
the test suite, which users have not.
"""

import sys

import torch

from runtime.nets import GatedMLP, Images, mlp, packed, thin

MODELS = {
    "chain": (lambda: mlp(40, 32, 24, 8), (7, 40)),
    "gated": (GatedMLP, (2, 3, 24)),
    "images": (Images, (2, 3, 8, 8)),
}


def check(what, model, x):
    with torch.no_grad():
        exact = model(x)
    if what == "export":
        exported = torch.export.export(model, (x,))
        assert any("rarefy" in str(node.target) for node in exported.graph.nodes)
        assert torch.allclose(exported.module()(x), exact, atol=1e-5)
        return
    if what == "dynamic":
        if isinstance(model, GatedMLP):
            return  # a plan takes any arguments, so that dynamic shapes cannot be given by name
        shapes = ({0: torch.export.Dim("tokens", min=2, max=64)},)
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes)
        other = torch.cat([x, x, x])
        assert torch.allclose(exported.module()(other), model(other), atol=1e-5)
        return
    compiled = torch.compile(model, fullgraph=True, backend=what)
    with torch.no_grad():
        assert torch.allclose(compiled(x), exact, atol=1e-5)
    y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(y).square().sum().backward()
    model(z).square().sum().backward()
    assert torch.allclose(y.grad, z.grad, atol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (make, shape) in MODELS.items():
        for what in sys.argv[1:]:
            torch.compiler.reset()
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            check(what, packed(thin(make())), x)
            sys.stdout.write(f"{name} {what}\n")
