"""Virtual time: every process of a call with a clock of its own, which its program moves on, line by line.

A product, a convolution and an attention take what a device's ceilings allow, each for itself. An exchange begins once
the last of its processes has come to it, and takes a latency and its bytes over the link. Everything else takes no
time, as in `work`; neither do weights that come in. So a real call takes longer, on one device and on several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffkiln.program.exchange import sent
from diffkiln.program.ir import CALL, EXCHANGES, REGION, STEP, Module, Op, Program
from diffkiln.program.layers import own_call, own_module
from diffkiln.program.mesh import LAYERS, Mesh
from diffkiln.program.work import Ceilings, work_of

#: Seconds that an exchange takes before its first byte comes. NCCL's small ones are reported at 6 µs for two H100 of
#: one machine in CUDA graphs (https://github.com/NVIDIA/nccl/issues/1259); at 25 NCCL itself estimates those of eight
#: (https://github.com/NVIDIA/nccl/issues/1453).
LATENCY = 20e-6


@dataclass(frozen=True)
class Link:
    """The link between devices.

    Attributes:
        bandwidth: bytes a second that one device sends while it is sent as many.
        latency: seconds of each exchange before its first byte comes.
    """

    bandwidth: float
    latency: float = LATENCY


@dataclass
class Clock:
    """The time of one process, in seconds.

    Attributes:
        now: since the call began.
        computing, exchanging, waiting: what it is made of.
        steps: when each denoising step ended.
    """

    now: float = 0.0
    computing: float = 0.0
    exchanging: float = 0.0
    waiting: float = 0.0
    steps: list[float] = field(default_factory=list)

    @property
    def step(self) -> float | None:
        """Returns the time of a step in the middle of the call; None for a call of fewer than two."""
        lasted = sorted(after - before for before, after in zip(self.steps, self.steps[1:], strict=False))
        return lasted[len(lasted) // 2] if lasted else None

    def compute(self, seconds: float) -> None:
        """Moves on by what is computed."""
        self.now += seconds
        self.computing += seconds

    def exchange(self, begins: float, seconds: float) -> None:
        """Waits until an exchange begins, and moves on to its end."""
        self.waiting += begins - self.now
        self.exchanging += seconds
        self.now = begins + seconds


class _Stretch(NamedTuple):
    """What a stretch of a program asks of a process: seconds of computing, and then how it ends.

    That is an exchange of so many bytes with all processes along an axis, which is "" for all of them; or the end of a
    step; or nothing.
    """

    seconds: float
    axis: str | None = None
    nbytes: int = 0
    is_step: bool = False


def clocks_of(
    call: Program, modules: Mapping[str, Module], ceilings: Ceilings, mesh: Mesh | None = None, link: Link | None = None
) -> list[Clock]:
    """Returns the clock of each process at the end of a call.

    Args:
        call: of a pipeline.
        modules: the components that it calls.
        ceilings: of each process's device.
        mesh: the processes; None for one.
        link: between their devices; needed where they exchange tensors.
    """
    mesh = mesh or Mesh({})
    clocks = [Clock() for _ in range(mesh.size)]
    for stretches in zip(*_lines(call, modules, ceilings, mesh), strict=True):
        for clock, own in zip(clocks, stretches, strict=True):
            clock.compute(own.seconds)
        end = stretches[0]
        if end.axis is not None:
            assert link is not None, "processes that exchange tensors have a link"
            _exchange(clocks, mesh, end.axis, link.latency + end.nbytes / link.bandwidth)
        for clock in clocks if end.is_step else ():
            clock.steps.append(clock.now)
    return clocks


def _lines(
    call: Program, modules: Mapping[str, Module], ceilings: Ceilings, mesh: Mesh
) -> Iterator[Sequence[_Stretch]]:
    """Yields the stretches of each process; those that run the same have one list."""
    parts: dict[int, _Components] = {}
    known: dict[tuple[bool, int], list[_Stretch]] = {}
    for rank in range(mesh.size):
        index = mesh.index(rank, LAYERS)
        if index not in parts:
            parts[index] = _Components({name: own_module(module, index) for name, module in modules.items()}, ceilings)
        key = rank == 0, index
        if key not in known:
            known[key] = list(parts[index].line(own_call(call, rank)))
        yield known[key]


def _exchange(clocks: Sequence[Clock], mesh: Mesh, axis: str, seconds: float) -> None:
    """Moves the clocks on over an exchange of all processes along an axis."""
    ranks = range(mesh.size)
    for peers in {mesh.peers(rank, axis) if axis else tuple(ranks) for rank in ranks}:
        begins = max(clocks[rank].now for rank in peers)
        for rank in peers:
            clocks[rank].exchange(begins, seconds)


class _Components:
    """What the programs of components ask of a process, each found once."""

    def __init__(self, modules: Mapping[str, Module], ceilings: Ceilings) -> None:
        self._modules, self._ceilings = modules, ceilings
        self._known: dict[tuple[str, str], list[_Stretch]] = {}

    def line(self, call: Program) -> Iterator[_Stretch]:
        """Yields the stretches of a call, of which each but the last has an end."""
        seconds = 0.0
        for stretch in self._of_call(call):
            seconds += stretch.seconds
            if stretch.axis is not None or stretch.is_step:
                yield stretch._replace(seconds=seconds)
                seconds = 0.0
        yield _Stretch(seconds)

    def _of_call(self, call: Program) -> Iterator[_Stretch]:
        for op in call.ops:
            if op.name != CALL:
                yield self._of(op, call)
                continue
            key = op.attrs["component"], op.attrs["program"]
            if key not in self._known:
                self._known[key] = list(self._within(*key))
            yield from self._known[key]

    def _within(self, component: str, name: str) -> Iterator[_Stretch]:
        module = self._modules[component]
        program = module.programs[name]
        regions: dict[str, float] = {}
        for op in program.ops:
            if op.name != REGION:
                yield self._of(op, program)
                continue
            region = module.regions[op.attrs["region"]]
            if region.name not in regions:
                regions[region.name] = sum(self._of(inner, region).seconds for inner in region.ops)
            yield _Stretch(regions[region.name])

    def _of(self, op: Op, program: Program) -> _Stretch:
        if op.name in EXCHANGES:
            return _Stretch(0.0, op.attrs.get("axis", ""), sent(op, program))
        return _Stretch(self._ceilings.seconds(work_of(op, program.types)), is_step=op.name == STEP)
