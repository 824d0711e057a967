"""What a user declares: source, target, inputs, passes, runtime. Everything that decides the result, and nothing else.

Docstrings and descriptions of fields are those of the JSON Schema, and of the hint where a field is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from diffkiln.spec.inputs import Inputs
from diffkiln.spec.problems import refuse
from diffkiln.spec.quality import Gate
from diffkiln.spec.ranges import Count
from diffkiln.spec.strict import MAX_ITEMS, Amount, Conflict, Json, OneOrMany, Strict, as_tuple

Dtype = Literal["float32", "bfloat16", "float16"]
Isa = Literal["x86-64-v2", "x86-64-v3", "x86-64-v4"]

Text = Annotated[str, Field(min_length=1)]
Gigabytes = Annotated[float, Field(gt=0, le=1_000_000)]


Variant = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$", examples=["fp16"])]


class ComponentSource(Strict):
    """The source of one component that is not the model's own."""

    model: Text | None = Field(
        default=None,
        description="A local directory with the component, or a pipeline that has it, or a repository id on the Hub.",
    )
    revision: Text | None = Field(
        default=None, description="Commit of the Hub repository, 40 hexadecimal digits. A Hub id needs it."
    )
    subfolder: Text | None = Field(
        default=None,
        description="The directory in the model. Absent: the model itself, or the component's name in a pipeline.",
    )
    variant: Variant | None = Field(default=None, description="Variant of the weight files, such as `fp16`.")
    single_file: Text | None = Field(
        default=None,
        description="A `.safetensors` file of another layout with the component's weights, relative to the spec. "
        "Without `model`, the configuration is the one that the component has in the source.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if "model" not in given and "single_file" not in given:
            yield (), refuse("does not say where the component is", 'Add "model", or null to leave the component out')
        for name in ("revision", "subfolder"):
            if name in given and "model" not in given:
                yield (name,), refuse('is of a "model", and none is given', "Remove it")
        if "variant" in given and "single_file" in given:
            yield ("variant",), refuse("a single file has no variants", "Remove it")
        yield from _no_pickle(given)


def _no_pickle(given: Mapping[str, Any]) -> Iterator[Conflict]:
    file = given.get("single_file")
    if isinstance(file, str) and not file.endswith(".safetensors"):
        reason = "is no .safetensors file, and loading another can run code that it carries"
        yield ("single_file",), refuse(reason, "Save its tensors as safetensors")


class Source(Strict):
    """The source of the pipeline: a model, a single file, or an architecture with random weights."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["model"]}, {"required": ["single_file"]}, {"required": ["architecture", "seed"]}]
        }
    )

    model: Text | None = Field(
        default=None,
        description="A local directory in diffusers' format, or a repository id on the Hugging Face Hub.",
    )
    revision: Text | None = Field(
        default=None,
        description="Commit of the Hub repository, 40 hexadecimal digits. A Hub id needs it, to stay exact.",
    )
    architecture: Text | None = Field(
        default=None,
        description="Known architecture, such as `flux.1-dev`, filled with random weights of the true shapes.",
    )
    single_file: Text | None = Field(
        default=None,
        description="A `.safetensors` file with the weights of a whole pipeline, as `from_single_file` reads them; "
        "relative to the spec.",
    )
    config: Text | None = Field(
        default=None,
        description="Directory in diffusers' format, or repository id on the Hub, with the configuration of "
        "`single_file`. Absent: the repository that diffusers knows for such a file.",
    )
    variant: Variant | None = Field(
        default=None,
        description="Variant of the weight files, such as `fp16`, for the components that have it.",
    )
    components: Annotated[dict[str, OneOrMany[ComponentSource] | None], Field(min_length=1, max_length=64)] | None = (
        Field(
            default=None,
            description="Components from elsewhere: null leaves one out, an object replaces it, and a list makes one "
            "of several models, such as ControlNets.",
        )
    )
    omit: Annotated[tuple[Literal["safety_checker"], ...], Field(strict=False, min_length=1, max_length=1)] | None = (
        Field(
            default=None,
            description="`safety_checker`: nothing looks at the images, and none is made black.",
        )
    )
    gguf: Annotated[dict[str, Text], Field(min_length=1)] | None = Field(
        default=None,
        description="GGUF files with the weights of components: {component: file, relative to the spec}.",
    )
    pipeline: Text | None = Field(
        default=None,
        description="Pipeline class to use instead of the one in `model_index.json`, such as `FluxImg2ImgPipeline`; it "
        "must take the same components.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="Seed of the random weights of `architecture`.",
    )
    dtype: Dtype | None = Field(
        default=None,
        description="Type of the weights before any pass. Absent: as the checkpoint was saved.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        kinds = [name for name in ("model", "single_file", "architecture") if name in given]
        if len(kinds) != 1:
            how_many = "neither is given" if not kinds else "both are given" if len(kinds) == 2 else "all are given"
            yield (), refuse(f'needs exactly one of "model", "single_file" and "architecture", and {how_many}')
        elif "architecture" not in given and "seed" in given:
            yield ("seed",), refuse("a model has its own weights", 'Remove it, or give "architecture"')
        elif "architecture" in given and "seed" not in given:
            yield ("seed",), refuse("an architecture needs the seed of its random weights", 'Add it: "seed": 0')
        if "gguf" in given and "model" not in given:
            yield ("gguf",), refuse('only a "model" has components with files', "Remove it")
        for name in {"components", "omit"} & given.keys() if "architecture" in given else ():
            yield (name,), refuse("an architecture has the components that it is made of", "Remove it")
        if "variant" in given and "model" not in given:
            yield ("variant",), refuse('only a "model" has variants', "Remove it")
        if "config" in given and "single_file" not in given:
            yield ("config",), refuse('is the configuration of a "single_file", and none is given', "Remove it")
        if "revision" in given and "model" not in given and "single_file" not in given:
            yield ("revision",), refuse('only a "model" has revisions', "Remove it")
        yield from _no_pickle(given)
        gguf, components = given.get("gguf"), given.get("components")
        for name in components if isinstance(gguf, dict) and isinstance(components, dict) else ():
            if name in gguf:
                yield ("components", name), refuse("its weights are a GGUF file already", "Remove one of the two")


class Parallel(Strict):
    """The processes that run one call together, one for each device."""

    guidance: Annotated[int, Field(ge=1, le=2)] = Field(
        default=1, description="2: the prompt's branch of the denoiser runs on one device, the other branch on another."
    )
    layers: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Number of devices of which each holds and runs a range of the denoiser's blocks. It saves memory "
        "and no time.",
    )
    sequence: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Number of devices that share the tokens of an image or a video (Ulysses)."
    )

    first: Annotated[tuple[Text, ...], Field(strict=False, max_length=16)] = Field(
        default=(),
        description="Components that the first process alone holds and runs, such as text encoders: it sends what they "
        "give to the others.",
    )
    tiles: bool = Field(
        default=False, description="Whether the tiles of a decoder are shared among all processes (pass `vae`)."
    )

    #: The fields that are numbers of processes.
    axes: ClassVar = ("guidance", "layers", "sequence")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if _size({name: given.get(name, 1) for name in cls.axes}) == 1:
            yield (), refuse("is one process", 'Remove it, or share the work, such as {"guidance": 2}')
        if given.get("layers", 1) != 1 and given.get("sequence", 1) != 1:
            reason = 'shares out whole blocks, and "sequence" splits them where their attention is'
            yield ("layers",), refuse(reason, "Remove one of the two")

    @property
    def counts(self) -> dict[str, int]:
        """Returns the processes along each axis that has several."""
        return {name: count for name in self.axes if (count := getattr(self, name)) > 1}


def _size(counts: Mapping[str, Any]) -> int | None:
    """Returns the product of what may be no numbers yet; None then."""
    values = list(counts.values())
    return math.prod(values) if all(type(value) is int for value in values) else None


class TargetSpec(Strict):
    """The machine that the bundle is for: a named GPU, a GPU's numbers written out, or a CPU."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"device": {"const": "cpu"}}},
                {"properties": {"device": {"const": "cuda"}}, "required": ["gpu"]},
                {
                    "properties": {"device": {"const": "cuda"}},
                    "required": ["compute_capability", "memory_gb", "h2d_gb_per_s"],
                },
            ]
        }
    )
    numbers: ClassVar = ("compute_capability", "memory_gb", "h2d_gb_per_s", "memory_gb_per_s")
    required_numbers: ClassVar = ("compute_capability", "memory_gb", "h2d_gb_per_s")

    device: Literal["cuda", "cpu"] = Field(description="Kind of device.")
    gpu: Text | None = Field(
        default=None,
        description="Name of a known GPU, such as `nvidia-rtx-4090`; `diffkiln targets` lists them.",
    )
    compute_capability: Annotated[str, Field(pattern="^[1-9][0-9]?[.][0-9]$", examples=["8.9"])] | None = Field(
        default=None,
        description='Compute capability in quotes, such as `"8.9"`, for a GPU without a known name.',
    )
    memory_gb: Gigabytes | None = Field(default=None, description="Memory of the GPU in GB (10^9 bytes).")
    memory_gb_per_s: Gigabytes | None = Field(
        default=None,
        description="Bandwidth of the GPU's memory in GB/s (10^9 bytes a second).",
    )
    h2d_gb_per_s: Gigabytes | None = Field(
        default=None,
        description="Bandwidth from host to GPU, in one direction, in GB/s (10^9 bytes a second).",
    )
    driver: Annotated[str, Field(pattern="^[0-9]{1,4}([.][0-9]{1,4}){0,2}$", examples=["570.26"])] | None = Field(
        default=None,
        description="Oldest driver that must run the bundle. Absent: the oldest that the compiled code allows.",
    )
    cuda: Annotated[str, Field(pattern="^[0-9]{1,2}[.][0-9]{1,2}$", examples=["12.8"])] | None = Field(
        default=None,
        description="Oldest CUDA version that the driver must support. Absent: that of the compiling torch.",
    )
    isa: Isa = Field(
        default="x86-64-v3",
        description="Instruction set of the CPU; the compiling machine's own is never used.",
    )
    gpus: Annotated[int, Field(ge=1, le=128)] | None = Field(
        default=None, description="Number of such GPUs that run one call together. Absent: as `parallel` says."
    )
    parallel: Parallel | None = Field(
        default=None,
        description='How several processes share one call, such as `{"guidance": 2, "sequence": 2}`. Absent: there is '
        "one.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        written = [name for name in cls.numbers if name in given]
        if given.get("device") == "cpu":
            for name in ("gpu", *cls.numbers, "driver", "cuda", "gpus"):
                if name in given:
                    yield (name,), refuse("says something of a GPU, and the device is a CPU", "Remove it")
        elif given.get("device") == "cuda" and "gpu" in given:
            for name in written:
                hint = 'Remove it, or remove "gpu" and write all the numbers out'
                yield (name,), refuse('is known from "gpu"', hint)
        elif given.get("device") == "cuda":
            missing = [name for name in cls.required_numbers if name not in given]
            if missing and not written:
                yield (), refuse("does not say which GPU", 'Add "gpu", such as "gpu": "nvidia-rtx-4090"')
            for name in missing if written else ():
                yield (name,), refuse("a GPU whose numbers are written out needs this one too", "Add it")
        yield from _miscounted(given)


def _miscounted(given: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yields the conflict of a number of GPUs with the processes that share a call."""
    count, shared = given.get("gpus"), given.get("parallel")
    if type(count) is not int or given.get("device") != "cuda":
        return
    if shared is None and count > 1:
        hint = 'Add "parallel", such as {"guidance": 2}; its product is the number of GPUs'
        yield ("gpus",), refuse(f"does not say how {count} GPUs share a call", hint)
    elif isinstance(shared, dict):
        size = _size({name: shared.get(name, 1) for name in Parallel.axes})
        if size is not None and size != count:
            hint = f'Set "gpus" to {size}, or change "parallel"'
            yield ("gpus",), refuse(f'is {count}, and "parallel" shares a call among {size} processes', hint)


#: The backend of `compile` where a spec names none.
DEFAULT_BACKEND = "aot_inductor"


class PassEntry(Strict):
    """One pass and its options, which the pass itself checks."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Json]  # pyright: ignore[reportIncompatibleVariableOverride]

    name: Text = Field(description="Name of the pass; `diffkiln passes` lists them.")
    component: Text | None = Field(
        default=None,
        description="The pipeline's component that the pass works on, such as `transformer`.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """Returns all given fields but the name, as the pass's own model validates them. Lists are tuples."""
        given = {"component": self.component} if "component" in self.model_fields_set else {}
        return {**given, **(self.__pydantic_extra__ or {})}


class Offload(Strict):
    """The policy by which weights wait outside the GPU and come in ahead of their use, group by group."""

    strategy: Literal["group", "auto", "stream"] = Field(
        default="group",
        description="How weights move: each group of blocks comes and goes; auto: as many as fit stay in memory; "
        "stream: groups come through slots whose addresses stay the same.",
    )
    max_memory: Amount | None = Field(
        default=None,
        description="For auto and stream: the most memory of a call for weights, constants and results, and on a CPU "
        "for working memory; as bytes or such as 8GiB. Absent: the GPU's for auto, and as little as there can be for "
        "stream.",
    )
    type: Literal["block_level"] = Field(default="block_level", description="Unit of a group: whole blocks.")
    num_blocks_per_group: Count = Field(default=1, description="Number of blocks that move together.")
    use_stream: bool = Field(
        default=True,
        description="Copy on a separate stream, so that copies and computation overlap.",
    )
    to: Literal["host", "disk"] | None = Field(
        default=None,
        description="Where weights wait. Absent: host memory for a GPU, the disk for a CPU.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        strategy = given.get("strategy", "group")
        if "max_memory" in given and strategy == "group":
            reason = "is a limit for the strategies auto and stream, and group keeps none"
            yield ("max_memory",), refuse(reason, 'Set "strategy" to "auto"')
        if strategy == "stream" and given.get("use_stream") is False:
            reason = "weights that stream are copied on a stream of their own"
            yield ("use_stream",), refuse(reason, 'Remove it, or set "strategy" to "group"')

    @field_validator("type", mode="before")
    @classmethod
    def _refuse_leaves(cls, value: Any) -> Any:
        if value == "leaf_level":
            reason = "leaf_level does not work here: the hooks of leaves inside a compiled block never fire"
            raise refuse(reason, 'Use "block_level"')
        return value


#: What the spec and the pass say of their field `fewer`.
FEWER = (
    "Numbers of adapters with programs and engines of their own, which compute no more slots than that: a call takes "
    "the smallest that fits it. Each takes as long to compile as the whole. Absent: 0 and 1, where all slots take 1.05 "
    "times the arithmetic or more."
)


class Adapters(Strict):
    """Room for adapters beside the weights of a denoiser: low-rank inputs of its linear layers."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=16, description="Highest rank of an adapter; those of a lower one fit too."
    )
    slots: Annotated[int, Field(ge=1, le=64)] = Field(
        default=2, description="Number of adapters that one call may use."
    )
    fewer: Annotated[tuple[Annotated[int, Field(ge=0, le=63)], ...] | None, Field(strict=False)] = Field(
        default=None, description=FEWER
    )
    include: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=("*",), description="Patterns of the layers that have room."
    )
    exclude: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="Patterns of the layers that have none."
    )


class Runtime(Strict):
    """The runtime's handling of the bundle. The bundle is resident on its device unless `offload` is given."""

    offload: Offload | None = Field(
        default=None,
        description="Offloading of weights. Absent: all weights stay on the device.",
    )
    tf32: bool | None = Field(
        default=None,
        description="Whether a GPU may compute float32 products in TF32. Absent: torch's own setting.",
    )
    cuda_graphs: Literal["step", "program"] | None = Field(
        default=None,
        description="Launch each denoising step, or the whole program except its noise, as a CUDA graph. Absent: none.",
    )
    adapters: Adapters | None = Field(
        default=None,
        description="Room for adapters beside the weights, so that rows of a batch may use different ones. Absent: "
        "adapters are added to the weights.",
    )
    on_incompatible: Literal["error", "eager"] = Field(
        default="error",
        description="If the engines do not fit the machine: stop with an error, or run every operation one by one.",
    )
    on_unrecordable: Literal["error", "diffusers"] = Field(
        default="error",
        description="If the call cannot be recorded: stop with an error, or make a bundle that runs as diffusers.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if given.get("cuda_graphs") is None or given.get("offload") is None:
            return
        offload = given["offload"] if isinstance(given["offload"], Mapping) else vars(given["offload"])
        if offload.get("strategy") != "stream":
            reason = "a graph holds the addresses of the weights, and with this offloading they come in at others"
            yield ("cuda_graphs",), refuse(reason, 'Remove it, remove "offload", or set its "strategy" to "stream"')
        elif offload.get("to") == "disk":
            reason = "a graph copies weights from the host's memory, and cannot read a disk"
            yield ("cuda_graphs",), refuse(reason, 'Remove it, or "to" of "offload"')


class Spec(Strict):
    """A diffusers pipeline to compile: source, target, inputs, passes and runtime."""

    schema_url: str | None = Field(
        default=None,
        alias="$schema",
        description="Address of the JSON Schema, for editors. It has no effect.",
    )
    spec_version: Literal[1] = Field(description="Version of this format.")
    source: Source = Field(description="Where the pipeline comes from.")
    target: OneOrMany[TargetSpec] = Field(
        description="The machine that the bundle is for, or a list of machines.",
    )
    inputs: OneOrMany[Inputs] = Field(
        description="The fixed inputs of the call, or a list of them: one variant each.",
    )
    passes: Annotated[tuple[PassEntry, ...], Field(strict=False)] = Field(
        default=(),
        description="The passes in the order in which they run.",
    )
    quality: Annotated[tuple[Gate, ...], Field(strict=False, min_length=1, max_length=16)] | None = Field(
        default=None,
        description="Gates of quality: a bundle that does not keep them is not published.",
    )
    runtime: Runtime = Field(default=Runtime(), description="How the bundle runs.")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        entries = given.get("target")
        listed = entries if isinstance(entries, list | tuple) else [entries]
        shared = [entry.get("parallel") for entry in listed[:MAX_ITEMS] if isinstance(entry, dict)]
        if any(one != shared[0] for one in shared):
            reason = 'lists targets with different "parallel", and all targets of a bundle share its programs'
            yield ("target",), refuse(reason, "Say the same of all, or make two bundles")
        if not any(shared):
            return
        runtime = given.get("runtime")
        if isinstance(runtime, dict) and runtime.get("cuda_graphs") is not None:
            reason = "a graph holds one process's work, and several processes exchange tensors in every step"
            yield ("runtime", "cuda_graphs"), refuse(reason, 'Remove it, or remove "parallel" from "target"')
        if given.get("quality") is not None:
            reason = "gates are evaluated in one process, and this bundle runs in several"
            yield ("quality",), refuse(reason, 'Evaluate the spec without "parallel", which draws the same pictures')

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        return as_tuple(self.target)

    @property
    def parallel(self) -> dict[str, int]:
        """Returns the processes along each axis that has several; nothing for one process."""
        first = self.targets[0].parallel
        return first.counts if first is not None else {}

    @property
    def shared(self) -> Parallel | None:
        """Returns how several processes share a call; None for one process."""
        return self.targets[0].parallel

    @property
    def variants(self) -> tuple[Inputs, ...]:
        """Returns one `Inputs` for each choice of the fixed inputs."""
        return tuple(variant for entry in as_tuple(self.inputs) for variant in entry.each())

    def as_json(self) -> dict[str, Any]:
        """Returns the spec as a JSON value with every default written out; `parse_spec` gives back an equal spec."""
        written = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        # A null that a user wrote into a pass's options may mean something to the pass.
        written["passes"] = [entry.model_dump(mode="json", exclude_unset=True) for entry in self.passes]
        return written
