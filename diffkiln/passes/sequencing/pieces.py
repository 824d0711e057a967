"""A component over shards: its regions are split where tensors are exchanged, into pieces that are regions, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.sequencing.attending import Attending
from diffkiln.passes.sequencing.layout import Layout
from diffkiln.passes.sequencing.sharing import Resegment, Sharing
from diffkiln.program import (
    ATTENTION,
    REGION,
    SDPA,
    SHARED,
    Module,
    Op,
    Program,
    Ref,
    split_off,
    weight_in,
    written_anew,
)

#: So often the segments of a region's inputs are found anew.
_TRIES = 32


@dataclass(frozen=True)
class _Split:
    """A region over shards: the layouts of its inputs and results, and its operations, of which some are pieces."""

    inputs: Mapping[str, Layout]
    outputs: Sequence[Layout | None]
    program: Program


class _Regions:
    """The regions of a component over shards, each for the layouts that it is called with."""

    def __init__(self, module: Module, count: int) -> None:
        self.module, self.count, self.split = module, count, 0
        self.pieces: dict[str, Program] = {}
        self._seeds = {name: _seeds(region) for name, region in module.regions.items()}
        self._known: dict[tuple[str, tuple[tuple[str, Layout], ...]], _Split] = {}

    def of(self, name: str, given: Mapping[str, Layout]) -> _Split:
        """Returns a region for inputs of which some come in shards already."""
        key = name, tuple(sorted(given.items(), key=lambda item: item[0]))
        if key not in self._known:
            self._known[key] = self._made(self.module.regions[name], {**self._seeds[name], **given})
        return self._known[key]

    def _made(self, region: Program, layouts: dict[str, Layout]) -> _Split:
        for _ in range(_TRIES):
            attending = Attending()
            try:
                for name, layout in layouts.items():
                    if layout.size % self.count or any(size % self.count for size in layout.segments):
                        Sharing(region, self.count, {}, {}).check(name[1:], layout)
                sharing = Sharing(region, self.count, layouts, _attentions(attending)).run()
                break
            except Resegment as wish:
                layouts = {**layouts, wish.name: replace(layouts[wish.name], segments=wish.segments)}
        else:
            raise ValueError(f"no order of the tokens fits all of {region.name}")
        self.split += attending.split
        outputs = [sharing.layouts.get(ref.name) for ref in region.outputs]
        return _Split(layouts, outputs, self._in_pieces(sharing.built(region.outputs)))

    def _in_pieces(self, program: Program) -> Program:
        """Returns a region with each run of operators between exchanges as a region of its own."""
        levels: dict[str, int] = {}
        runs: dict[int, list[int]] = {}
        lines: dict[int, list[Op]] = {}
        for at, op in enumerate(program.ops):
            level = max((levels.get(ref.name, 0) for ref in op.uses), default=0)
            if op.name in SHARED:
                lines.setdefault(level, []).append(op)
                level += 1
            else:
                runs.setdefault(level, []).append(at)
            levels |= dict.fromkeys(op.outputs, level)
        ops: list[Op] = []
        for level in range(max([*runs, *lines], default=0) + 1):
            if level in runs:
                ops.append(self._piece(program, runs[level]))
            ops += lines.get(level, ())
        return written_anew(program, ops, program.types, program.outputs)

    def _piece(self, program: Program, positions: Sequence[int]) -> Op:
        name = f"{program.name}.{len(self.pieces)}"
        piece = replace(split_off(program, positions), name=name)
        self.pieces[name] = piece
        args = tuple(item.ref for item in piece.inputs)
        return Op(REGION, args, tuple(ref.name for ref in piece.outputs), attrs={"region": name, "instance": ""})


def share_module(module: Module, count: int) -> tuple[Module, int]:
    """Shares the tokens of a component's programs among processes.

    Args:
        module: the denoiser, with regions.
        count: processes that share the tokens.

    Returns:
        The component, whose programs give on every process what they gave, and the number of attentions in regions that
        exchange heads for tokens.

    Raises:
        ValueError: tokens or heads cannot be shared evenly; names them with the numbers.
    """
    regions = _Regions(module, count)
    programs = {name: _shared(program, regions) for name, program in module.programs.items()}
    return replace(module, programs=programs, regions=regions.pieces), regions.split


def _shared(program: Program, regions: _Regions) -> Program:
    attending = Attending()

    def region(sharing: Sharing, op: Op) -> bool:
        _call(sharing, op, regions)
        return True

    others = {REGION: region, **_attentions(attending)}
    sharing = Sharing(program, regions.count, {}, others).run()
    outputs = [sharing.value(ref, None) for ref in program.outputs]
    return sharing.built(outputs)


def _call(sharing: Sharing, op: Op, regions: _Regions) -> None:
    """Writes the operations of a region over shards in the place of its call."""
    region = regions.module.regions[op.attrs["region"]]
    args = [arg for arg in op.args if isinstance(arg, Ref)]
    pairs = list(zip(region.inputs, args, strict=True))
    given = {item.name: sharing.layouts[arg.name] for item, arg in pairs if arg.name in sharing.layouts}
    split = regions.of(region.name, given)
    names = {item.name: sharing.value(arg, split.inputs.get(item.name)).name for item, arg in pairs}
    names |= {ref.name: name for ref, name in zip(region.outputs, op.outputs, strict=True)}
    own = f"%{op.outputs[0][1:]}.in"

    def new(name: str) -> str:
        if name.startswith("@"):
            return f"@{weight_in(op, name[1:])}"
        return names.setdefault(name, f"{own}.{name[1:]}") if name.startswith("%") else name

    for line in split.program.ops:
        attrs = {**line.attrs, "instance": op.attrs["instance"]} if line.name == REGION else line.attrs
        outputs, uses = tuple(map(new, line.outputs)), tuple(Ref(new(ref.name)) for ref in line.uses)
        known = [name for name in (*line.outputs, *(ref.name for ref in line.uses)) if new(name) not in sharing.types]
        sharing.types |= {new(name): split.program.types[name] for name in (*known, *line.outputs)}
        sharing.ops.append(replace(line, args=uses, outputs=outputs, attrs=attrs))
    for name, layout in zip(op.outputs, split.outputs, strict=True):
        if layout is not None:
            sharing.layouts[name] = layout


def _attentions(attending: Attending) -> dict[str, Attending]:
    return {SDPA: attending, ATTENTION: attending}


def _seeds(region: Program) -> dict[str, Layout]:
    """Returns the inputs that hold tokens of which queries are made: shards of them are shards of the queries."""
    found: dict[str, Layout] = {}
    for item in region.inputs:
        for dim, size in enumerate(item.type.shape):
            layout = Layout(dim, (size,))
            if size > 1 and _reaches(region, item.name, layout):
                found[item.name] = layout
                break
    return found


def _reaches(region: Program, name: str, layout: Layout) -> bool:
    """Returns True if shards of an input become shards of some queries' tokens."""
    attending = Attending()
    layouts = {name: layout}
    for _ in range(_TRIES):
        try:
            # One process has equal shards of everything.
            Sharing(region, 1, layouts, _attentions(attending)).run()
            return attending.reached
        except Resegment as wish:
            layouts = {wish.name: replace(layout, segments=wish.segments)}
    return False
