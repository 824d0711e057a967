"""The intermediate representation: straight-line programs in static single assignment form.

One kind of program serves three levels. The *call* of a pipeline calls components; a *component* (text encoder,
denoiser, VAE) calls regions; a *region* (one repeated block) holds operators only. Values have names with a sigil:

    %12, %latents    the result of an operation, or an input
    @proj.weight     a weight, by its name in the component (in a region: relative to the block's instance)
    #1f0c…           a constant, by the key of its content in the bundle's constants

Nothing here imports torch: dtypes are their names ("bfloat16"), operators are their ATen names ("aten.add.Tensor").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Operations that are not ATen operators.
#: What NOISE may draw.
DISTRIBUTIONS = NORMAL, UNIFORM, EXPONENTIAL = "normal", "uniform", "exponential"
CALL, REGION, NOISE, STEP, ATTENTION = "call", "region", "noise", "step_end", "attention"
#: Operations of a program that several processes run together.
OWN, SHARD, ALL_GATHER, ALL_TO_ALL = "own", "shard", "all_gather", "all_to_all"
FROM_FIRST, FROM_ONE = "from_first", "from_one"
#: Those in which processes exchange tensors, and all of them.
EXCHANGES = frozenset({ALL_GATHER, ALL_TO_ALL, FROM_FIRST, FROM_ONE})
SHARED = EXCHANGES | {OWN, SHARD}


@dataclass(frozen=True, slots=True)
class Ref:
    """The use of a value by its name, sigil included."""

    name: str

    @property
    def bare(self) -> str:
        """Returns the name without its sigil: a weight's name, a constant's key, what an argument is called."""
        return self.name[1:]

    @property
    def is_computed(self) -> bool:
        """Returns True if it is an operation's result or an input."""
        return self.name.startswith("%")

    @property
    def is_constant(self) -> bool:
        return self.name.startswith("#")


@dataclass(frozen=True, slots=True)
class DType:
    """A literal torch dtype, by name without the `torch.` prefix."""

    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """The one symbolic device: wherever the program runs."""


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """A literal memory format, by name ("contiguous_format")."""

    name: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A literal layout, by name ("strided")."""

    name: str


#: An argument: a value, a literal, or a tuple of arguments.
Arg = Ref | DType | Device | MemoryFormat | Layout | str | int | float | bool | None | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class TensorType:
    """Dtype name and shape of a value."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Input:
    """A value that the caller brings. `source` says where a call's input comes from; it is empty elsewhere.

    Sources: {"kind": "tokens", "text": <index into Program.texts>, "key": "input_ids"}, {"kind": "scalar", "keyword":
    "guidance_scale"}, {"kind": "tensor", "keyword": "latents"} and {"kind": "image", …} (`diffkiln.program.images`).
    """

    name: str
    type: TensorType
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ref(self) -> Ref:
        """Returns a reference to the input."""
        return Ref(self.name)

    @property
    def argument(self) -> str:
        """Returns what it is called in Python: inputs are named after the parameters that they were recorded for."""
        return self.ref.bare


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `name` is an ATen operator or one of the names below; `attrs` belongs to the latter, and to
    `scaled_dot_product_attention`, where {"kernel"} names the one of torch's kernels that is to run.

    CALL       attrs {"component", "program"}, args = the component program's inputs in order
    REGION     attrs {"region", "instance"}, args = the region's inputs in order; its weights are `instance`'s, which is
               empty for a region that is no block: its weights are the component's
    NOISE      attrs {"shape", "dtype"}: standard normal, drawn in program order as diffusers' `randn_tensor` draws it;
               with "seeded" false by torch's own generator, where the pipeline leaves the caller's out; "distribution"
               may say that it is uniform from 0 to 1, or exponential with rate 1
    STEP       attrs {"step", "timestep"}, args = (latents,): the end of a step, where a caller may replace them
    ATTENTION  attrs {"kernel", "causal", "scale"}, args = (query, key, value), each [batch, heads, tokens, channels]:
               attention by a package's kernel; `causal` masks the keys after the query's own place, `scale` may be null

    Every process of several runs the same program. `axis` is one of the mesh, `count` its number of processes:

    OWN        attrs {"axis", "count"}, args = one value for each process of the axis: gives the process's own
    SHARD      attrs {"axis", "count", "dim"}, args = (value,): gives the process's own of `count` equal parts of `dim`
    ALL_GATHER attrs {"axis", "count"}, args = (value,): gives the values of all processes of the axis, in their order
    ALL_TO_ALL attrs {"axis", "count", "split", "join"}, args = (value,): each process parts `split` in `count` equal
               parts, sends one to each, and joins those that it is given along `join`, in the order of the processes
    FROM_FIRST attrs {"count"}, args = (value,): gives the first process's value to all `count` processes of the mesh
    FROM_ONE   attrs {"axis", "count", "index"}, args = any values: gives those of the axis's process of this index to
               all of the axis, in one exchange
    """

    name: str
    args: tuple[Arg, ...]
    outputs: tuple[str, ...]
    kwargs: Mapping[str, Arg] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_aten(self) -> bool:
        return self.name.startswith("aten.")

    @property
    def results(self) -> tuple[Ref, ...]:
        """Returns the uses of its outputs."""
        return tuple(map(Ref, self.outputs))

    @property
    def uses(self) -> Iterator[Ref]:
        """Returns the values that it takes, in order."""
        return refs((self.args, self.kwargs))


@dataclass(frozen=True, slots=True)
class Program:
    """A straight line of operations. `types` holds the type of every input, weight, constant and result.

    `texts` are the text templates of a call. `signature` describes how Python calls what was recorded:
    {"args": […], "kwargs": {…}, "result": …} with `Ref`s for tensors, so that a region can stand in for its module.
    `batch` is "doubled" or "halved" for a component's program at another batch than its pipeline calls it with.
    `ahead` says that a call runs this program of a component before its denoising loop, a preamble.
    `slots` says that the program computes so many of its layers' slots for adapters, in the place of the program
    `instead_of`, which computes all. `recorded_from` is the class of a region's block, where the region was recorded
    and not read.
    """

    name: str
    inputs: tuple[Input, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Ref, ...]
    types: Mapping[str, TensorType]
    texts: tuple[Mapping[str, Any], ...] = ()
    signature: Mapping[str, Any] = field(default_factory=dict)
    batch: str = ""
    ahead: bool = False
    slots: int | None = None
    instead_of: str = ""
    recorded_from: str = field(default="", compare=False)

    @property
    def weights(self) -> tuple[str, ...]:
        """Returns the names of the weights, without sigil, in order of first use."""
        return tuple(name[1:] for name in self.uses() if name.startswith("@"))

    @property
    def constants(self) -> tuple[str, ...]:
        """Returns the keys of the constants, without sigil, in order of first use."""
        return tuple(name[1:] for name in self.uses() if name.startswith("#"))

    def result_types(self, stem: str) -> dict[str, TensorType]:
        """Returns the types of its outputs, numbered after a stem: what an operation that calls it gives."""
        return {f"{stem}.{index}": self.types[ref.name] for index, ref in enumerate(self.outputs)}

    def makers(self) -> dict[str, Op]:
        """Returns the operation that gives each result, in order."""
        return {name: op for op in self.ops for name in op.outputs}

    def uses(self) -> Iterator[str]:
        """Yields every value that is used, once, in order of first use."""
        seen: set[str] = set()
        for group in (*(op.uses for op in self.ops), self.outputs):
            for ref in group:
                if ref.name not in seen:
                    seen.add(ref.name)
                    yield ref.name


@dataclass(frozen=True, slots=True)
class Module:
    """A component's programs and the regions that they call, as one unit on disk (`programs/<component>.json`)."""

    component: str
    programs: Mapping[str, Program]
    regions: Mapping[str, Program] = field(default_factory=dict)

    def weight_types(self, without: Collection[str] = ()) -> Iterator[tuple[str, TensorType]]:
        """Yields every weight that its programs read, and the regions that they call, but those `without`; with its
        type."""
        for program in self.programs.values():
            yield from ((name, program.types[f"@{name}"]) for name in program.weights)
            for op in program.ops:
                if op.name == REGION and op.attrs["region"] not in without:
                    region = self.regions[op.attrs["region"]]
                    yield from ((weight_in(op, name), region.types[f"@{name}"]) for name in region.weights)


def engine_types(region: Program) -> dict[str, TensorType]:
    """Returns the types of an engine's arguments, in order: inputs, weights and constants, by their names."""
    names = [f"@{name}" for name in region.weights] + [f"#{key}" for key in region.constants]
    return {item.name: item.type for item in region.inputs} | {name: region.types[name] for name in names}


def weight_in(op: Op, weight: str) -> str:
    """Returns what a weight of the program that a REGION or CALL operation calls is named where the operation
    stands."""
    if op.name == CALL:
        return weight_of_call(op.attrs["component"], weight)
    return f"{op.attrs['instance']}.{weight}" if op.attrs["instance"] else weight


def weight_of_call(component: str, weight: str) -> str:
    """Returns the name in a call of a component's weight that the call reads itself."""
    return f"{component}/{weight}"


def owner_of(weight: str) -> tuple[str, str]:
    """Returns the component of such a weight, and its name there."""
    component, _, name = weight.partition("/")
    return component, name


def refs(arg: Any) -> Iterator[Ref]:
    """Yields the values that an argument (or any nest of tuples, lists and dicts) uses, in order."""
    if isinstance(arg, Ref):
        yield arg
    elif isinstance(arg, (tuple, list)):
        for item in arg:
            yield from refs(item)
    elif isinstance(arg, Mapping):
        for item in arg.values():
            yield from refs(item)


def map_refs(arg: Any, rename: Callable[[Ref], Any]) -> Any:
    """Returns the argument with every `Ref` replaced by `rename(ref)`."""
    if isinstance(arg, Ref):
        return rename(arg)
    if isinstance(arg, (tuple, list)):
        return tuple(map_refs(item, rename) for item in arg)
    if isinstance(arg, Mapping):
        return {key: map_refs(item, rename) for key, item in arg.items()}
    return arg
