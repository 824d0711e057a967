"""The one way in which programs are edited after they were recorded.

    edit = Builder(call)
    scaled = edit.op("aten.mul.Tensor", (latents, 2.0), {"%scaled": type_})
    edit.insert(3, scaled)
    edit.replace_uses("%noise", *scaled.results)
    program = edit.build()

A program is never changed: `build` gives a new one, which is verified. Places are indices of the operations of the
program that the builder began with, whatever has been inserted or removed since. A name that is wished for and taken
gets a number, so that no value hides another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from diffkiln.program.ir import NOISE, REGION, STEP, Arg, Input, Op, Program, Ref, TensorType, map_refs, weight_in
from diffkiln.program.verify import verify

_T = TypeVar("_T")


class Builder:
    """Edits of one program.

    Args:
        program: to begin with.
        fields: of it, to begin with in the place of its own.

    Attributes:
        program: as it was in the beginning.
        makers: the operation that gives each value, as it was first written.
    """

    def __init__(self, program: Program, **fields: Any) -> None:
        self.program = replace(program, **fields)
        self._ops = {at: [op] for at, op in enumerate(self.program.ops)}
        self._before: dict[int, list[Op]] = {}
        self._instead: dict[str, Ref] = {}
        self._types = dict(self.program.types)
        self._inputs, self._outputs = [*self.program.inputs], [*self.program.outputs]
        self.makers = self.program.makers()
        self._taken = self.makers.keys() | {item.name for item in self._inputs}

    # -- values --

    def type_of(self, ref: Ref) -> TensorType:
        """Returns the type of a value, an edit's own among them."""
        return self._types[ref.name]

    def current(self, arg: _T) -> _T:
        """Returns an argument, or an operation, with the values that stand in the place of those that were replaced."""
        if isinstance(arg, Op):
            return replace(arg, args=self.current(arg.args), kwargs=self.current(arg.kwargs))
        return map_refs(arg, lambda ref: self._instead.get(ref.name, ref))

    def constant(self, key: str, type_: TensorType) -> Ref:
        """Returns the use of a constant by its key."""
        self._types[f"#{key}"] = type_
        return Ref(f"#{key}")

    def add_input(self, name: str, type_: TensorType, source: Mapping[str, Any] | None = None) -> Ref:
        """Returns a new value that the caller brings, after all others."""
        self._inputs.append(Input(self._fresh(name, type_), type_, source or {}))
        return self._inputs[-1].ref

    def add_outputs(self, *refs: Ref) -> None:
        """Gives more values to the caller, after all others."""
        self._outputs += refs

    def replace_uses(self, name: str, by: Ref) -> None:
        """Has everything that uses one value use another, also what this edit puts in."""
        by = self.current(by)
        if by.name != name:
            self._instead = {old: by if ref.name == name else ref for old, ref in self._instead.items()}
            self._instead[name] = by

    # -- operations --

    def op(
        self,
        name: str,
        args: tuple[Arg, ...],
        results: Mapping[str, TensorType],
        kwargs: Mapping[str, Arg] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> Op:
        """Returns a new operation, whose results have these types, and these names where they are free. It is not put
        anywhere yet."""
        outputs = tuple(self._fresh(wish, type_) for wish, type_ in results.items())
        return Op(name, args, outputs, kwargs or {}, attrs or {})

    def insert(self, at: int, *ops: Op) -> None:
        """Puts operations before the one at a place, and after what was inserted there earlier."""
        self._before.setdefault(at, []).extend(ops)
        self._note(ops)

    def append(self, *ops: Op) -> None:
        """Puts operations at the end."""
        self.insert(len(self.program.ops), *ops)

    def replace(self, at: int, *ops: Op) -> None:
        """Puts operations in the place of one; with none, removes it."""
        self._ops[at] = list(ops)
        self._note(ops)

    def map(self, change: Callable[[Op], Op]) -> Builder:
        """Replaces every operation by what `change` gives for it."""
        for at, op in enumerate(self.program.ops):
            self.replace(at, change(op))
        return self

    def ops_at(self, at: int) -> Sequence[Op]:
        """Returns the operations that stand now in the place of one."""
        return tuple(self._ops[at])

    def rename_result(self, at: int, name: str, wish: str) -> None:
        """Gives a result another name where it is made, and only there: what uses `name` waits for its new maker."""
        fresh = self._fresh(wish, self._types[name])
        swap = {name: fresh}
        self.replace(at, *(replace(op, outputs=tuple(swap.get(o, o) for o in op.outputs)) for op in self._ops[at]))

    # -- programs within programs --

    def inline(self, at: int, callee: Program) -> None:
        """Puts the operations of the program that is called at a place where its call is."""
        call = self.program.ops[at]
        names = {item.name: ref.name for item, ref in zip(callee.inputs, call.uses, strict=True)}
        names |= {f"@{weight}": f"@{weight_in(call, weight)}" for weight in callee.weights}
        for op in callee.ops:
            names |= {ref.name: self._fresh(f"%{at}.{ref.bare}", callee.types[ref.name]) for ref in op.results}
        listed = rename(callee, names)
        self._types |= listed.types
        self.replace(at, *listed.ops)
        for name, ref in zip(call.outputs, listed.outputs, strict=True):
            self.replace_uses(name, ref)

    def outline(self, positions: Sequence[int], call: Callable[[Program], tuple[str, Mapping[str, Any]]]) -> None:
        """Puts one operation in the place of several that follow each other, which become a program of their own.

        That takes everything as an input, weights and constants too, and its values are numbered in order: runs that
        compute the same give equal programs. `call` is given it, and gives the operation's name and attributes.
        """
        part = _part(self.program, positions, closed=True)
        names = {item.name: f"%in.{index}" for index, item in enumerate(part.inputs)}
        names |= {name: f"%{index}" for index, name in enumerate(part.makers())}
        outlined = rename(part, names)
        verify(outlined, alone=True)
        name, attrs = call(outlined)
        args, results = tuple(item.ref for item in part.inputs), tuple(ref.name for ref in part.outputs)
        for position in positions:
            self.replace(position)
        self.replace(positions[-1], Op(name, args, results, attrs=attrs))

    # -- the end --

    def build(self) -> Program:
        """Returns the edited program, with the types of what it uses and no others. Raises `VerifyError` if it is
        malformed."""
        built = replace(
            self.program,
            inputs=tuple(self._inputs),
            ops=tuple(map(self.current, self._lines())),
            outputs=self.current(tuple(self._outputs)),
            signature=self.current(self.program.signature),
            types=self._types | {item.name: item.type for item in self._inputs},
        )
        built = _with_types_in_use(built)
        verify(built, alone=True)
        return built

    def _lines(self) -> Iterator[Op]:
        for at in range(len(self.program.ops) + 1):
            yield from self._before.get(at, ())
            yield from self._ops.get(at, ())

    def _note(self, ops: Iterable[Op]) -> None:
        for op in ops:
            for name in op.outputs:
                self.makers.setdefault(name, op)

    def _fresh(self, wish: str, type_: TensorType) -> str:
        """Returns a name that no value has, with its type."""
        name, count = wish, 1
        while name in self._taken:
            count += 1
            name = f"{wish}.{count}"
        self._taken |= {name}
        self._types[name] = type_
        return name


# -- whole programs --


def rename(program: Program, names: Mapping[str, str]) -> Program:
    """Returns the program with values renamed at every use."""

    def new(name: str) -> str:
        return names.get(name, name)

    def swap(arg: Any) -> Any:
        return map_refs(arg, lambda ref: Ref(new(ref.name)))

    def renamed(op: Op) -> Op:
        return replace(op, args=swap(op.args), kwargs=swap(op.kwargs), outputs=tuple(map(new, op.outputs)))

    return replace(
        program,
        inputs=tuple(replace(item, name=new(item.name)) for item in program.inputs),
        ops=tuple(map(renamed, program.ops)),
        outputs=swap(program.outputs),
        types={new(name): type_ for name, type_ in program.types.items()},
        signature=swap(program.signature),
    )


def prune(program: Program, kept: Collection[str] = (NOISE, STEP)) -> Program:
    """Returns the program without operations whose results nothing uses, and without the types of what they alone used.

    Noise and the ends of steps stay: the first moves the generator, the second is seen by the caller.

    Args:
        program: any.
        kept: names of operations that stay.
    """
    live = {ref.name for ref in program.outputs}
    left: list[Op] = []
    for op in reversed(program.ops):
        if op.name in kept or not live.isdisjoint(op.outputs):
            left.append(op)
            live.update(ref.name for ref in op.uses)
    return _with_types_in_use(replace(program, ops=tuple(reversed(left))))


def split_off(program: Program, positions: Sequence[int], outputs: tuple[Ref, ...] | None = None) -> Program:
    """Returns the operations at some places, in order, as a program of what they take from the others.

    It gives what others read of them, or the `outputs`.
    """
    part = _part(program, positions, outputs)
    verify(part, alone=True)
    return part


def written_anew(
    program: Program, ops: Sequence[Op], types: Mapping[str, TensorType], outputs: Sequence[Ref]
) -> Program:
    """Returns a program of the same inputs, by their names, with other operations throughout.

    Args:
        program: whose name, inputs and signature it has.
        ops: all of them; what nothing uses is left out.
        types: of all values, the inputs among them, whose types may be others than before.
        outputs: in the place of the program's own, also in its signature.
    """
    instead = dict(zip(program.outputs, outputs, strict=True))
    inputs = tuple(replace(item, type=types[item.name]) for item in program.inputs)
    signature = map_refs(program.signature, lambda ref: instead.get(ref, ref))
    new = replace(program, inputs=inputs, ops=tuple(ops), outputs=tuple(outputs), types=types, signature=signature)
    return prune(new)


def caller_of(program: Program) -> Program:
    """Returns a program of the same inputs and outputs that consists of one call of the region of its name."""
    edit = Builder(program, ops=(), outputs=())
    args = tuple(item.ref for item in program.inputs)
    attrs = {"region": program.name, "instance": ""}
    call = edit.op(REGION, args, program.result_types("%result"), attrs=attrs)
    edit.append(call)
    edit.add_outputs(*call.results)
    return edit.build()


def _part(
    program: Program, positions: Sequence[int], outputs: tuple[Ref, ...] | None = None, closed: bool = False
) -> Program:
    """Returns operations as a program; a closed one takes weights and constants as inputs, under their own names."""
    chosen = set(positions)
    ops = tuple(program.ops[position] for position in positions)
    made = {name for op in ops for name in op.outputs}
    if outputs is None:
        others = (op for at, op in enumerate(program.ops) if at not in chosen)
        read = {ref.name for op in others for ref in op.uses} | {ref.name for ref in program.outputs}
        outputs = tuple(ref for op in ops for ref in op.results if ref.name in read)
    used = dict.fromkeys(ref for op in ops for ref in op.uses) | dict.fromkeys(outputs)
    taken = (ref.name for ref in used if ref.name not in made and (closed or ref.is_computed))
    inputs = tuple(Input(name, program.types[name]) for name in taken)
    return _with_types_in_use(Program(program.name, inputs, ops, outputs, program.types))


def _with_types_in_use(program: Program) -> Program:
    named = {*program.uses(), *program.makers(), *(item.name for item in program.inputs)}
    return replace(program, types={name: type_ for name, type_ in program.types.items() if name in named})
