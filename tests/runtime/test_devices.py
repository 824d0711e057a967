"""What a GPU refuses and a CPU does not: operators whose tensors are in two places.

Every program is replayed with fake tensors that pretend to be on a GPU, as the executor places them: single numbers
stay on the host. Fake tensors compare devices as the operators do, and need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffkiln.aten import Interpreter, dtype_of
from diffkiln.compiler import check
from diffkiln.program import ATTENTION, CALL, NOISE, REGION, STEP, Op, Program, TensorType
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from diffkiln.record.quiet import quiet_libraries
from diffkiln.runtime.executor import _placed
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
GPU = torch.device("cuda:0")


class Copies(TorchDispatchMode):
    """Notes operators that copy from the host to the GPU, which no CUDA graph can hold.

    An operator takes a single number of the host's as a number. These copy it as a tensor.
    """

    COPYING = ("_to_copy", "to", "copy", "index", "index_put", "lift_fresh_copy")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.partition("::")[2]
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if name in self.COPYING and any(x.is_cpu for x in given) and any(x.is_cuda for x in made):
            self.found.append(name)
        return result


def programs(recording: Recording) -> Iterator[tuple[str, Program]]:
    for call in recording.calls:
        yield from (("the call", program) for program in call.values())
    for name, module in recording.modules.items():
        for program in (*module.programs.values(), *module.regions.values()):
            yield name, program


def replayed(program: Program, recording: Recording) -> list[str]:
    """The operators that copy from the host. Raises what an operator raises that finds its tensors in two places."""

    def fake(kind: TensorType) -> torch.Tensor:
        return torch.empty(kind.shape, dtype=dtype_of(kind.dtype), device=GPU)

    def opaque(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        def run(*given: Any) -> Sequence[torch.Tensor]:
            # A component and a region take their tensors to the GPU themselves, and a step's end gives what it took.
            return [fake(program.types[name]) for name in op.outputs]

        return run

    special = dict.fromkeys((CALL, REGION, NOISE, STEP, ATTENTION), opaque)
    with FakeTensorMode() as mode, Copies() as copies:
        inputs = [fake(item.type) if item.source.get("kind") != "scalar" else 1.5 for item in program.inputs]
        weights = {name: fake(program.types[f"@{name}"]) for name in program.weights}
        tensors = recording.constants.tensors
        constants = {key: _placed(mode.from_tensor(tensors[key]), GPU) for key in program.constants}
        copies.found.clear()
        for output in Interpreter(program, GPU, special)(inputs, weights, constants):  # type: ignore[arg-type]
            assert output.device == GPU or output.ndim == 0
    return copies.found


def test_the_stand_in_finds_what_a_gpu_would_refuse_and_what_is_copied() -> None:
    with FakeTensorMode(), Copies() as copies:
        there, here, number = torch.ones(3, device=GPU), torch.ones(3), torch.tensor(2.0)
        assert (there * number).device == GPU
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            there * here
        assert copies.found == []
        torch.ops.aten._to_copy.default(number, device=GPU)
        assert copies.found == ["_to_copy"]


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_programs_tensors_are_where_its_operators_take_them(family: str, families) -> None:
    made = check(spec_of(family, families))
    with quiet_libraries():
        recording = record(made.pipe, made.requests, Constants())
    for where, program in programs(recording):
        assert replayed(program, recording) == [], f"{where}, {program.name}: copies from the host"
