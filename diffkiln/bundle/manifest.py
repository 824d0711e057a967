"""What a bundle says about itself: `manifest.json`, whose SHA-256 is the bundle's id.

The manifest names every file with its size and digest, so whoever knows the id knows every byte. It holds no
time and no host name: the same inputs give the same id.

Numbers: canonical JSON (RFC 8785) writes 1.0 as `1` and -0.0 as `0`, so in the free-form parts (`options`,
`fixed`, `source`, `runtime`) a float that happens to be whole comes back as an int. Integers beyond
±(2**53 - 1) cannot be written at all: put them in a string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from diffkiln.bundle import strict_json
from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.layout import MANIFEST, MANIFEST_DIGEST, PARTIAL, SIGNATURE, UNHASHED, misplaced
from diffkiln.bundle.paths import check_unique, refuse_unsafe
from diffkiln.bundle.versions import PACKAGE, SPECIFIER
from diffkiln.errors import Incompatible, ManifestInvalid, MissingDependency, Problem

FORMAT_NAME = "diffkiln-bundle"
FORMAT_MAJOR = 1
FORMAT_MINOR = 0
# What a bundle may demand of its reader by name. A feature is added here together with the code that honours it.
# channels_last: tensors that weights' files hold as [N, H, W, C] and programs take as [N, C, H, W].
# attention_kernels: operations that name the kernel of their attention, and the pass attention_backend.
# image_inputs: inputs of calls that are images. unseeded_noise: noise that the caller's generator does not draw.
# distributions: noise that is uniform or exponential.
# glyphs: prompts that may not quote anything, since another encoder would see it.
# form: prompts that must be of a form, such as JSON with an instruction.
# prompt_tokens: prompts whose number of tokens picks the variant.
# quotations: prompts of which what is quoted is tokenized character by character.
# tensor_inputs: inputs of calls that are tensors, besides latents. results: several results, or none that are pictures.
# two_step_resize: images that are made smaller in two steps, as Pillow does with a `reducing_gap`.
# low_rank: layers whose weights are stored in fewer bits, and two narrow matrices beside them.
# adapter_slots: layers with narrow matrices beside their weights, which adapters are put into.
# mixed_devices: targets of which some are CPUs and some GPUs, so that `runtime.device` is not that of all.
# processes: programs that several processes run together, exchanging tensors; `runtime.parallel` says how many.
ADAPTER_SLOTS = "adapter_slots"
PROCESSES = "processes"
KNOWN_FEATURES: frozenset[str] = frozenset(
    {
        ADAPTER_SLOTS,
        "attention_kernels",
        "channels_last",
        "distributions",
        "form",
        "glyphs",
        "image_inputs",
        "low_rank",
        "mixed_devices",
        PROCESSES,
        "prompt_tokens",
        "quotations",
        "results",
        "tensor_inputs",
        "two_step_resize",
        "unseeded_noise",
    }
)

RESERVED = UNHASHED | {MANIFEST, MANIFEST_DIGEST, PARTIAL, SIGNATURE}

MAX_MANIFEST_BYTES = 16 * 1024 * 1024
MAX_ROWS = 100_000
MAX_RANK = 32
MAX_INTEGER = 2**53 - 1  # what canonical JSON can hold
_MAX_PROBLEMS = 20

# A manifest is written by a machine: after one bad row there is no need to hear of a hundred thousand.
_ROWS = Field(max_length=MAX_ROWS, fail_fast=True)

Role = Literal["config", "program", "weights", "native", "doc"]


def _bundle_path(text: str) -> str:
    refuse_unsafe(text)
    return text


# No controls, no format characters (which turn the direction of text, or take no room), no separators of lines.
_SHOWN = r"^[^\p{Cc}\p{Cf}\p{Zl}\p{Zp}]*$"
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=_SHOWN)]
Text = Annotated[str, StringConstraints(max_length=4096, pattern=_SHOWN)]
# Both are printed as advice, after `pip install`.
Package = Annotated[str, StringConstraints(max_length=256, pattern=PACKAGE)]
Specifier = Annotated[str, StringConstraints(max_length=256, pattern=SPECIFIER)]
Dtype = Annotated[str, StringConstraints(max_length=32, pattern=r"^[a-z][a-z0-9_]*$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BundlePath = Annotated[str, StringConstraints(max_length=1024), AfterValidator(_bundle_path)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Dimensions = Annotated[tuple[Count, ...], Field(max_length=MAX_RANK)]
Json = Annotated[dict[str, JsonValue], Field(max_length=MAX_ROWS)]


def _policy(given: dict[str, Any]) -> dict[str, Any]:
    """Checks the fields of the runtime's part that loading reads without further checks."""
    for name, (what, holds) in _POLICY.items():
        if name in given and not holds(given[name]):
            raise ValueError(f"{name} should be {what}")
    return given


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_packages(value: Any) -> bool:
    """Returns True if `value` maps names of packages to version specifiers."""
    return _are_texts(value) and all(
        re.fullmatch(PACKAGE, name) and re.fullmatch(SPECIFIER, versions) for name, versions in value.items()
    )


def _is_gpu(row: Any) -> bool:
    """Returns True if the row is well formed, for the fields that it has.

    They are the `sm` and `ptx` of the engines' code, whether it is for that one `exact`ly, whether it was `autotuned`,
    and the `packages` that run it.
    """
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name, ""), str) for name in ("sm", "ptx"))
        and all(isinstance(row.get(name, False), bool) for name in ("exact", "autotuned"))
        and _are_packages(row.get("packages", {}))
    )


#: What several processes share: the branches of guidance, a denoiser's blocks, and the tokens of a sequence.
_AXES = ("guidance", "layers", "sequence")


def _is_mesh(value: Any) -> bool:
    """Returns True if the processes of a call are given by the axes that have several."""
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= set(_AXES)
        and all(type(count) is int and 1 < count <= 64 for count in value.values())
    )


def _is_offload(value: Any) -> bool:
    """Returns True if the policy of offloading is an object whose limit of memory, if it has one, is a whole number."""
    limit = value.get("max_memory", 1) if isinstance(value, dict) else None
    return isinstance(limit, int) and not isinstance(limit, bool) and limit > 0


_POLICY: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "device": ("cpu or cuda", lambda value: value in ("cpu", "cuda")),
    "devices": (
        "an object of cpu and cuda",
        lambda value: isinstance(value, dict) and all(device in ("cpu", "cuda") for device in value.values()),
    ),
    "offload": (
        "an object or null, its max_memory a number of bytes",
        lambda value: value is None or _is_offload(value),
    ),
    "on_incompatible": ("text", lambda value: isinstance(value, str)),
    "only_diffusers": ("text", lambda value: isinstance(value, str)),
    "targets": ("an object of texts", _are_texts),
    "gpus": (
        "an object that says what the engines of each target hold",
        lambda value: isinstance(value, dict) and all(map(_is_gpu, value.values())),
    ),
    "parallel": ("an object of the numbers of processes along guidance, layers and sequence", _is_mesh),
    "first": ("a list of components", _are_names),
    "cuda_graphs": ("step or program", lambda value: value in (None, "step", "program")),
    "tf32": ("true, false or null", lambda value: value is None or isinstance(value, bool)),
}


class _Entry(BaseModel):
    # A later minor of the format may add fields. What a reader must understand stands in `features_required`,
    # so what it does not know is left aside.
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Format(_Entry):
    name: Literal["diffkiln-bundle"] = FORMAT_NAME
    major: Count = FORMAT_MAJOR
    minor: Count = FORMAT_MINOR


class Requires(_Entry):
    """The machine's required properties. `None` means that the bundle does not care."""

    python: Text  # version specifier, ">=3.11"
    torch: Text  # version specifier, "==2.13.*"
    cuda: Text | None = None  # the release torch must be built with, "13.0"
    driver: Text | None = None  # lowest NVIDIA driver, "580.65"
    sm: Text | None = None  # compute capability, "sm_90"
    cpu_isa: Text | None = None  # "x86-64-v3"
    os: Text = "linux"
    machine: Text = "x86_64"
    glibc: Text | None = None  # lowest, "2.34"
    packages: Annotated[dict[Package, Specifier], Field(max_length=1000)] = {}  # name to version specifier


class Variant(_Entry):
    """One choice of the inputs fixed at compile time, and the programs that run it."""

    name: Name
    fixed: Json
    programs: Annotated[dict[Name, BundlePath], Field(max_length=MAX_ROWS)]


class Pipeline(_Entry):
    class_name: Name
    diffusers_version: Text
    variants: Annotated[tuple[Variant, ...], _ROWS]


class FileEntry(_Entry):
    path: BundlePath
    size: Count  # bytes
    sha256: Digest
    role: Role


class TensorSpec(_Entry):
    dtype: Dtype
    shape: Dimensions
    stride: Dimensions  # in elements

    @model_validator(mode="after")
    def _addressable(self) -> TensorSpec:
        if len(self.shape) != len(self.stride):
            raise ValueError(f"shape has {len(self.shape)} dimensions and stride {len(self.stride)}")
        # Zeros count as one: whoever multiplies from left to right must not overflow on the way.
        if math.prod(max(size, 1) for size in self.shape) >= 2**63:
            raise ValueError("the shape's product overflows 64 bits")
        if sum(max(n - 1, 0) * step for n, step in zip(self.shape, self.stride, strict=True)) >= 2**63:
            raise ValueError("the last element's offset overflows 64 bits")
        return self


class EngineEntry(_Entry):
    """One region lowered by one backend for one target. `inputs` and `outputs` are leaves, in order."""

    target: Name
    component: Name
    region: Name
    backend: Name
    path: BundlePath  # directory in the bundle
    inputs: Annotated[tuple[TensorSpec, ...], _ROWS]
    outputs: Annotated[tuple[TensorSpec, ...], _ROWS]
    options: Json = {}


class AppliedPass(_Entry):
    name: Name
    version: Count
    options: Json = {}
    changed: bool


class GroupEntry(_Entry):
    """A group of weights that are loaded and dropped together: one offload group, one safetensors file."""

    name: Name
    file: BundlePath
    tensors: Count
    bytes: Count


class Manifest(_Entry):
    format: Format = Format()
    features_required: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    source: Json
    requires: Requires
    pipeline: Pipeline
    files: Annotated[tuple[FileEntry, ...], _ROWS]
    engines: Annotated[tuple[EngineEntry, ...], _ROWS] = ()
    passes: Annotated[tuple[AppliedPass, ...], _ROWS] = ()
    runtime: Annotated[Json, AfterValidator(_policy)] = {}
    weights: Annotated[dict[Name, Annotated[tuple[GroupEntry, ...], _ROWS]], Field(max_length=MAX_ROWS)] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        check_unique(row.path for row in self.files)
        for row in self.files:
            check_role(row.path, row.role)
        roles = {row.path: row.role for row in self.files}
        if clash := sorted(RESERVED.intersection(roles)):
            raise ValueError(f"{clash[0]} cannot be among the files that the manifest hashes")
        for variant in self.pipeline.variants:
            for path in variant.programs.values():
                if roles.get(path) != "program":
                    raise ValueError(f"variant {variant.name!r}: {path!r} is not a program in `files`")
        for component, groups in self.weights.items():
            for group in groups:
                if roles.get(group.file) != "weights":
                    raise ValueError(f"weights of {component!r}: {group.file!r} is not weights in `files`")
        return self


def check_role(path: str, role: Role) -> None:
    """Raises `ManifestInvalid` for a file that has no place in a bundle."""
    if reason := misplaced(path, role):
        raise ManifestInvalid(
            f"the file {path[:200]!r} has no place in a bundle: {reason}. If a later diffkiln made the bundle, load it "
            "with that; else get it from somebody whom you trust"
        )


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest that may be hostile.

    Raises `ManifestInvalid`, `PathEscape` for a path that is refused, and `Incompatible` for a format or a required
    feature that this version does not know.
    """
    try:
        raw = strict_json.loads(data, max_bytes=MAX_MANIFEST_BYTES)
    except strict_json.StrictJSONError as error:
        raise ManifestInvalid(f"{MANIFEST}: {error}") from error
    _check_format(raw)
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ManifestInvalid(problems=problems(error)) from error


def dump_manifest(manifest: Manifest) -> bytes:
    """Returns the manifest as canonical JSON. Needs the extra `compile`; raises `ManifestInvalid`."""
    try:
        import rfc8785
    except ImportError as error:
        raise MissingDependency(
            "writing a bundle needs the package rfc8785: pip install 'diffkiln[compile]'"
        ) from error
    try:
        data = rfc8785.dumps(manifest.model_dump(mode="json"))
    except ValueError as error:
        raise ManifestInvalid(f"{MANIFEST} cannot be written as canonical JSON: {error}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"{MANIFEST} has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    return data


def bundle_id(data: bytes) -> str:
    """Returns the id of the bundle whose `manifest.json` has these bytes."""
    return sha256_bytes(data)


def problems(error: ValidationError) -> list[Problem]:
    """Returns pydantic's findings as JSON paths and reasons; only the first few if there are many."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    result = [Problem(json_path(item["loc"]), item["msg"]) for item in found[:_MAX_PROBLEMS]]
    if len(found) > _MAX_PROBLEMS:
        result.append(Problem("", f"and {len(found) - _MAX_PROBLEMS} more problems"))
    return result


def json_path(location: tuple[int | str, ...]) -> str:
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in location)


def _check_format(raw: Any) -> None:
    """Checks the version before the rest: another major may give every other field another meaning."""
    stated = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(stated, dict) or stated.get("name") != FORMAT_NAME:
        raise ManifestInvalid(f"{MANIFEST} is not the manifest of a diffkiln bundle")
    major = stated.get("major")
    if type(major) is not int or major < 0:
        raise ManifestInvalid(problems=[Problem("$.format.major", "should be a whole number")])
    if major != FORMAT_MAJOR:
        raise Incompatible(
            f"bundle format: found major {major}, this diffkiln reads major {FORMAT_MAJOR}. "
            "Load it with a diffkiln that reads that format, or build it again with this one"
        )
    features = raw.get("features_required")
    named = [name for name in features if isinstance(name, str)] if isinstance(features, list) else []
    if unknown := sorted(set(named) - KNOWN_FEATURES):
        raise Incompatible(
            f"required features: found {', '.join(repr(name[:100]) for name in unknown[:10])}, this diffkiln "
            f"knows {', '.join(sorted(KNOWN_FEATURES)) or 'none'}. Install a later diffkiln"
        )
