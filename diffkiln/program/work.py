"""The work of a call: its arithmetic, the bytes that this reads and writes, and the weights that come in.

Counted are products of matrices, convolutions and attention, as everything else is small beside them or is fused into
them. Divided by what a device can do at most, they give the least time that a call takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from diffkiln.program.convolutions import is_convolution
from diffkiln.program.ir import ATTENTION, CALL, REGION, STEP, Module, Op, Program, Ref, TensorType
from diffkiln.program.moments import PHASES, Groups, Moment, phases_of
from diffkiln.program.operators import nbytes

_PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "_int_mm", "_scaled_mm")
#: The widths of operands that a device multiplies at speeds of their own, in bits.
_NARROW = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")
_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Work:
    """An amount of work.

    Attributes:
        flops: additions and multiplications, by the operands' bits: 8, 16 and 32.
        nbytes: what products, convolutions and attention read and write, weights included.
    """

    flops: Mapping[int, int] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def total(self) -> int:
        """Returns all additions and multiplications."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Ceilings:
    """The most that a device can do; None is not known.

    Attributes:
        flops: additions and multiplications a second, by the operands' bits.
        memory: bytes a second, to and from its memory.
        link: bytes of weights a second that come in.
    """

    flops: Mapping[int, float] = field(default_factory=dict)
    memory: float | None = None
    link: float | None = None

    @property
    def known(self) -> bool:
        """Returns True if anything is."""
        return bool(self.flops or self.memory or self.link)

    def seconds(self, work: Work) -> float:
        """Returns the least time that work takes, as far as the ceilings are known."""
        arithmetic = sum(count / self.flops[bits] for bits, count in work.flops.items() if self.flops.get(bits))
        return max(arithmetic, work.nbytes / self.memory if self.memory else 0.0)

    def arrival(self, weights: int) -> float:
        """Returns the least time in which weights come in, in seconds."""
        return weights / self.link if self.link else 0.0


@dataclass(frozen=True)
class Phase:
    """The work of one phase of a call.

    Attributes:
        name: one of PHASES.
        parts: the work of each call of a component, in order.
        brought: bytes of weights that come in.
        ahead: whether they come while others are computed with.
        steps: denoising steps in it.
    """

    name: str
    parts: tuple[Work, ...]
    brought: int
    ahead: bool
    steps: int

    @property
    def work(self) -> Work:
        """Returns the work of all parts."""
        return summed(self.parts)

    def seconds(self, ceilings: Ceilings) -> float:
        """Returns the least time that the phase takes."""
        computing, coming = self.computing(ceilings), ceilings.arrival(self.brought)
        return max(computing, coming) if self.ahead else computing + coming

    def computing(self, ceilings: Ceilings) -> float:
        """Returns the least time of arithmetic and memory traffic alone."""
        return sum(map(ceilings.seconds, self.parts))


def summed(works: Iterable[Work]) -> Work:
    """Returns several amounts of work as one."""
    flops: dict[int, int] = {}
    total = 0
    for work in works:
        total += work.nbytes
        for bits, count in work.flops.items():
            flops[bits] = flops.get(bits, 0) + count
    return Work(flops, total)


def phases_of_work(
    call: Program, groups: Groups, moments: Sequence[Moment], coming: Sequence[int], ahead: bool
) -> tuple[Phase, ...]:
    """Returns the work of each phase of a call.

    Args:
        call: the call.
        groups: its components' weights.
        moments: of the call.
        coming: bytes of weights that come in for each moment.
        ahead: whether they come while others are computed with.
    """
    counter = _Counter(groups.modules)
    listed = list(zip(call.ops, phases_of(call, groups.modules), strict=True))
    found = []
    for name in PHASES:
        own = [op for op, phase in listed if phase == name]
        parts = tuple(counter.of_call(op) for op in own if op.name == CALL)
        steps = sum(op.name == STEP for op in own)
        brought = sum(size for size, moment in zip(coming, moments, strict=True) if moment.phase == name)
        if own:
            found.append(Phase(name, parts, brought, ahead, steps))
    return tuple(found)


def work_within(call: Program, modules: Mapping[str, Module], component: str) -> Work:
    """Returns the work of all calls of one component in a call."""
    counter = _Counter(modules)
    return summed(counter.of_call(op) for op in call.ops if op.name == CALL and op.attrs["component"] == component)


class _Counter:
    """Counts the work of components, each of which is looked at once."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._modules = modules
        self._known: dict[tuple[str, ...], Work] = {}

    def of_call(self, op: Op) -> Work:
        """Returns the work of a component that a call runs."""
        component = op.attrs["component"]
        return self._counted((component, "program", op.attrs["program"]))

    def _counted(self, key: tuple[str, ...]) -> Work:
        if key not in self._known:
            component, kind, name = key
            module = self._modules[component]
            program = module.programs[name] if kind == "program" else module.regions[name]
            self._known[key] = summed(self._of(component, op, program) for op in program.ops)
        return self._known[key]

    def _of(self, component: str, op: Op, program: Program) -> Work:
        if op.name == REGION:
            return self._counted((component, "region", op.attrs["region"]))
        return work_of(op, program.types)


def work_of(op: Op, types: Mapping[str, TensorType]) -> Work:
    """Returns the work of one operation; none for what is neither a product, nor a convolution, nor attention."""
    count = _flops(op, types)
    if not count:
        return Work()
    operands = [types[ref.name] for ref in op.uses]
    results = [types[name] for name in op.outputs]
    return Work({_bits(operands): count}, sum(map(nbytes, (*operands, *results))))


def _flops(op: Op, types: Mapping[str, TensorType]) -> int:
    if is_convolution(op):
        return _of_convolution(op, types)
    _, _, rest = op.name.partition(".")
    if op.name == ATTENTION or "scaled_dot_product" in rest:
        query, key, value = (_type(arg, types).shape for arg in op.args[:3])
        rows = types[_ref(op.args[0]).name].numel // query[-1]
        return 2 * rows * key[-2] * (query[-1] + value[-1])
    if op.is_aten and rest.partition(".")[0] in _PRODUCTS:
        first = _type(op.args[1 if "add" in rest.partition(".")[0] else 0], types)
        return 2 * types[op.outputs[0]].numel * first.shape[-1]
    return 0


def _of_convolution(op: Op, types: Mapping[str, TensorType]) -> int:
    """Returns the arithmetic of a convolution: each result is a product of one output channel's weights."""
    image, weight = _type(op.args[0], types), _type(op.args[1], types)
    transposed = op.name.startswith("aten.convolution.") and len(op.args) > 6 and op.args[6] is True
    sums = image.numel if transposed else types[op.outputs[0]].numel
    return 2 * sums * weight.numel // max(weight.shape[0], 1)


def _bits(operands: Sequence[TensorType]) -> int:
    """Returns the width of the narrowest operands that a product has two of; 32 where it has none narrower."""
    for bits, dtypes in ((8, _NARROW), (16, _HALF)):
        if sum(operand.dtype in dtypes for operand in operands) >= 2:
            return bits
    return 32


def _ref(arg: object) -> Ref:
    assert isinstance(arg, Ref), "products are of tensors"
    return arg


def _type(arg: object, types: Mapping[str, TensorType]) -> TensorType:
    return types[_ref(arg).name]
