"""Constants are the same whatever instructions the CPU has."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.interpreter.portable import portable
from diffkiln.program import TensorType
from diffkiln.record.components import run_shapes
from diffkiln.record.constants import Constants
from diffkiln.record.marked import Marked
from diffkiln.record.structure import flatten
from diffkiln.record.tape import Tape
from tests.portable import disguises

_NAMES = "sin cos tan tanh exp exp2 expm1 log log2 log10 log1p rsqrt sigmoid sqrt reciprocal erf atan sinh cosh"
UNARY = {name: getattr(torch, name) for name in _NAMES.split()}


def _values() -> dict[str, torch.Tensor]:
    """What schedulers, positions and embeddings are computed with, in their types."""
    made: dict[str, torch.Tensor] = {}
    x = torch.rand(1003, generator=torch.Generator().manual_seed(0)) * 20 + 1e-3
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = x.to(dtype)
        made |= {f"{name} {dtype}": function(y) for name, function in UNARY.items()}
        made[f"pow {dtype}"] = torch.cat([y**0.37, (y / 20) ** 7, 10000.0 ** (y / 20), y ** (y / 20)])
    made["sums"] = torch.stack([x.sum(), x.mean(), x.std(), x.norm(), (1 - x / 1e4).prod()])
    made["in a row"] = torch.stack([x.cumsum(0), (1 - x / 1e5).cumprod(0)])
    made["counted"] = torch.cat([torch.linspace(0.00085**0.5, 0.012**0.5, 1000), torch.arange(0.1, 100, 0.1)])
    made["fused"] = torch.stack([torch.add(x, x.flip(0), alpha=0.3), torch.addcmul(x, x, x.flip(0), value=0.3)])
    made["products"] = x[:900].view(30, 30) @ x[100:1000].view(30, 30)
    made["softmax"] = x[:1000].view(10, 100).softmax(-1)
    made["rotary"] = torch.view_as_real(torch.polar(torch.ones(63, 16), torch.outer(x[:63], x[63:79])))
    made["resized"] = torch.nn.functional.interpolate(x[:64].view(1, 1, 8, 8), size=(13, 13), mode="bicubic")
    made["in place"] = x.clone().div_(20).pow_(0.3).mul_(1.1).exp_()
    for kind in (np.float32, np.float64):
        z = x.numpy().astype(kind)
        parts = [np.sin(z), np.exp(-z), np.log(z), np.power(z, kind(0.3)), np.interp(z, np.arange(25), np.arange(25))]
        made[f"NumPy {kind.__name__}"] = torch.from_numpy(np.concatenate(parts))
    return made


def digests() -> dict[str, str]:
    with portable():
        made = _values()
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest() for name, tensor in made.items()
    }


#: MKL takes another way on CPUs of another maker, which its own setting shows on any.
OTHER_MKL = {f"MKL_CBWR={branch}": {"MKL_CBWR": branch} for branch in ("COMPATIBLE", "AUTO", "AVX2")}


@pytest.mark.parametrize("name", [*disguises(), *OTHER_MKL])
def test_gives_the_same_bits_with_fewer_instructions(name):
    command = [
        sys.executable,
        "-c",
        "import json, tests.interpreter.test_portable as t; print(json.dumps(t.digests()))",
    ]
    environment = os.environ | (disguises() | OTHER_MKL)[name] | {"OMP_NUM_THREADS": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == digests()


def test_rounds_once_from_the_wider_type():
    x = torch.linspace(0, 10, 999)
    with portable():
        found = torch.sin(x), torch.linspace(0, 1, 1000)
        assert np.log(np.float32(3)).dtype == np.float32
    assert torch.equal(found[0], torch.sin(x.double()).float())
    assert torch.equal(found[1], torch.linspace(0, 1, 1000, dtype=torch.float64).float())


def test_square_roots_are_rounded_once():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 10
    with portable():
        found = x.sqrt(), x**0.5
    exact = torch.from_numpy(np.sqrt(x.numpy()))  # IEEE 754 defines it, and MKL's differs in the last bit
    assert torch.equal(found[0], exact)
    assert torch.equal(found[1], exact)


def test_leaves_types_strides_views_and_random_numbers_as_they_are():
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).t()
    with portable():
        assert torch.exp(x).stride() == x.stride()
        assert torch.exp(x.bfloat16()).dtype == torch.bfloat16
        assert (
            torch.meshgrid(x[0], x[1], indexing="ij")[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        )
        drawn = torch.randn(50, generator=torch.Generator().manual_seed(2))
        assert x.sum(0, dtype=torch.float64).dtype == torch.float64
    assert torch.equal(drawn, torch.randn(50, generator=torch.Generator().manual_seed(2)))


def test_writes_into_the_tensor_that_is_written_to():
    x = torch.rand(9, generator=torch.Generator().manual_seed(1))
    view = x[2:5]
    with portable():
        want = torch.exp(view)
        assert view.exp_() is view
    assert torch.equal(x[2:5], want)


def test_numpy_is_as_it_was_afterwards():
    before = np.log
    with portable(), portable():
        assert np.log is not before
        assert np.power.outer([2], [3]).tolist() == [[8]]
    assert np.log is before


def test_what_depends_on_a_marked_tensor_is_computed_as_torch_does():
    x = torch.linspace(0, 10, 999)
    table = x.clone()
    with Marked([x]):
        own, other, written = torch.sin(x * 1.0), torch.sin(table), torch.zeros(999).copy_(x).sin_()
    assert torch.equal(own, torch.sin(x))
    assert torch.equal(written, torch.sin(x))
    assert torch.equal(other, torch.sin(table.double()).float())


def test_a_mark_is_on_the_memory_and_ends_with_a_block():
    x = torch.linspace(0, 10, 999)
    with Marked([]) as marked:
        with marked.alone([x]):
            inside = torch.sin(x[1:])
        outside = torch.sin(x[1:])
    assert torch.equal(inside, torch.sin(x[1:]))
    assert torch.equal(outside, torch.sin(x[1:].double()).float())


class Lazy(torch.nn.Module):
    """Makes its table when it is first called, and keeps it, as Z-Image's rotary embedding does."""

    table = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.sin(torch.linspace(0, 10, 999, dtype=torch.float64).float())
        return x + self.table


def test_a_table_that_is_kept_from_a_first_call_without_weights_is_the_same_everywhere():
    module, tape = Lazy(), Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants())
    leaves, structure = flatten(((tape.blank(TensorType("float32", (999,))),), {}))
    run_shapes(module, module.forward, leaves, structure, tape, "the module")
    assert torch.equal(
        module.table, torch.sin(torch.linspace(0, 10, 999, dtype=torch.float64).float().double()).float()
    )
