"""What a bundle is filled with: configuration, programs, engines, weights, and the manifest that names them all."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

import diffkiln
from diffkiln.aten import schemas
from diffkiln.bundle import (
    BundleWriter,
    EngineRow,
    FileRow,
    GroupRow,
    Manifest,
    PassRow,
    Pipeline,
    Requires,
    TensorSpec,
    Variant,
)
from diffkiln.errors import MissingDependency, RecordError
from diffkiln.exporters.base import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.registry import exporter
from diffkiln.layers import described, is_channels_last, repeated_blocks
from diffkiln.passes.base import CompileRequest
from diffkiln.passes.manager import Ran
from diffkiln.passes.registry import Placed
from diffkiln.program import Program, dumps, module_to_json, program_to_json
from diffkiln.record.components import weights_of
from diffkiln.record.pipeline import Recording, Request, defaults
from diffkiln.record.source import SourceModel
from diffkiln.runtime.compatibility import missing_flags
from diffkiln.runtime.engines import engine
from diffkiln.runtime.loading import CONSTANTS, LAYERS, SCHEMAS
from diffkiln.runtime.self_test import self_test
from diffkiln.runtime.weights import CHANNELS_LAST, REST, UNUSED
from diffkiln.spec import Offload, Target

if TYPE_CHECKING:
    from diffkiln.compiler import Checked


@dataclass
class Packed:
    """What has gone into the bundle so far, as far as the manifest has to tell."""

    recording: Recording
    offload: Offload | None
    notices: list[str]
    variants: list[Variant] = field(default_factory=list)
    engines: list[EngineRow] = field(default_factory=list)
    weights: dict[str, tuple[GroupRow, ...]] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)
    glibc: str | None = None


# -- configuration --


def pack_configuration(writer: BundleWriter, checked: Checked) -> None:
    """`pipeline/`: diffusers' own configuration, without weights, and which layers are stored in another form.
    `spec.json`, with the source and the files of the passes pinned."""
    source, spec = checked.source, checked.spec
    for name in source.files():
        if name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        writer.write(f"pipeline/{name}", _portable(source, name), "config")
    for name, module in checked.plan.modules.items():
        if layers := described(module):
            writer.write(f"pipeline/{name}/{LAYERS}", _json(layers), "config")
    written = spec.as_json()
    written["passes"] = [_pinned(index, entry, checked.placed) for index, entry in enumerate(written["passes"])]
    written.pop("$schema", None)
    kept = {key: value for key, value in written["source"].items() if key != "model" or "model" in source.origin}
    written["source"] = kept | source.pinned()
    writer.write("spec.json", _json(written), "config")


def _pinned(index: int, entry: dict[str, Any], placed: Sequence[Placed]) -> dict[str, Any]:
    """A pass as the spec gave it, with digests in the place of local paths."""
    own = [item.step.options() for item in placed if item.index == index and not item.key]
    return {key: own[0].get(key, value) for key, value in entry.items()} if own else entry


def _portable(source: SourceModel, name: str) -> bytes:
    """A configuration file without paths of the machine that it was made on, and without left-out components."""
    data = (source.folder / name).read_bytes()
    if Path(name).name not in ("config.json", "model_index.json", "scheduler_config.json", "tokenizer_config.json"):
        return data
    config = json.loads(data)
    if isinstance(config, dict):
        for key in ("_name_or_path", "name_or_path"):
            config.pop(key, None)
        if name == "model_index.json":
            config |= {
                key: [None, None] for key in config if _is_component(config[key]) and key not in source.components
            }
    return _json(config)


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2


# -- programs --


def pack_programs(writer: BundleWriter, packed: Packed, requests: Sequence[Request], pipe: Any) -> None:
    """`programs/`: the variants, the components, constants and operators' schemas; `text/`: the tokenizers."""
    recording = packed.recording
    for index, request in enumerate(requests):
        name = _variant_name(request, {variant.name for variant in packed.variants})
        fixed = recording.fixed[index] if recording.fixed else defaults(pipe, request)
        programs = recording.calls[index] if recording.calls else {}
        path = f"programs/{name}.json"
        if programs:
            free = {item.source["keyword"] for item in programs["call"].inputs if item.source.get("kind") == "scalar"}
            fixed = {key: value for key, value in fixed.items() if key not in free}
            data = {"programs": {key: program_to_json(program) for key, program in programs.items()}}
            writer.write(path, dumps(data), "program")
        packed.variants.append(Variant(name=name, fixed=fixed, programs=dict.fromkeys(programs, path)))
    for component, module in recording.modules.items():
        writer.write(f"programs/{component}.json", dumps(module_to_json(module)), "program")
    if recording.calls:
        every = every_program(recording)
        keys = sorted({key for program in every for key in program.constants})
        constants = {key: recording.constants.tensors[key] for key in keys}
        writer.write(CONSTANTS, safetensors.torch.save(constants), "program")
        writer.write(SCHEMAS, _json(schemas(every)), "program")
        for name, text in tokenizers_of(recording, pipe).items():
            writer.write(f"text/{name}.json", text.encode(), "config")


def every_program(recording: Recording) -> list[Program]:
    """Calls, components and regions."""
    calls = [program for programs in recording.calls for program in programs.values()]
    parts = [p for m in recording.modules.values() for p in (*m.programs.values(), *m.regions.values())]
    return calls + parts


def tokenizers_of(recording: Recording, pipe: Any) -> dict[str, str]:
    """The tokenizers that the calls use, by name, as the JSON of the tokenizers library.

    Raises:
        RecordError: a tokenizer is not backed by that library.
    """
    names = {text["tokenizer"] for programs in recording.calls for p in programs.values() for text in p.texts}
    return {name: _tokenizer_json(name, pipe.components[name]) for name in sorted(names)}


def _tokenizer_json(name: str, tokenizer: Any) -> str:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise RecordError(
            f"the tokenizer {name!r} ({type(tokenizer).__name__}) is not backed by the tokenizers library, which the "
            "runtime uses. Save the pipeline with a fast tokenizer"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str(pretty=True)


def _variant_name(request: Request, taken: set[str]) -> str:
    fixed = request.fixed
    sizes = [str(fixed[key]) for key in ("height", "width", "num_frames") if fixed.get(key)]
    name = "x".join(sizes) + f"-{fixed['num_inference_steps']}-steps"
    if request.batch_size > 1:
        name += f"-batch-{request.batch_size}"
    if fixed.get("num_images_per_prompt", 1) > 1:
        name += f"-images-{fixed['num_images_per_prompt']}"
    return name if name not in taken else f"{name}-{len(taken) + 1}"


# -- engines --


def pack_engines(
    writer: BundleWriter, packed: Packed, request: CompileRequest, targets: Sequence[Target], cache: EngineCache
) -> None:
    """`engines/<target>/<component>/<Region>/`: a component's regions for every target, tried where they can run."""
    module = packed.recording.modules.get(request.component)
    for region in module.regions.values() if module else ():
        constants = {key: packed.recording.constants.tensors[key] for key in region.constants}
        for target in targets:
            lowering = Lowering(region, target, constants, dict(request.options))
            artefact = exporter(request.backend).export(lowering, cache)
            path = f"engines/{target.name}/{request.component}/{region.name}"
            _try_out(artefact, region, constants, target, path, packed.notices)
            for file in sorted(artefact.directory.rglob("*")):
                if file.is_file():
                    relative = file.relative_to(artefact.directory).as_posix()
                    writer.write(f"{path}/{relative}", file.read_bytes(), "native")
            packed.glibc = max(filter(None, (packed.glibc, artefact.requires.get("glibc"))), key=_numbers, default=None)
            packed.engines.append(_engine_row(artefact, region, request, target, path))


def _engine_row(artefact: Artefact, region: Program, request: CompileRequest, target: Target, path: str) -> EngineRow:
    return EngineRow(
        target=target.name,
        component=request.component,
        region=region.name,
        backend=artefact.backend,
        path=path,
        inputs=tuple(TensorSpec.model_validate(spec) for spec in artefact.inputs),
        outputs=tuple(TensorSpec.model_validate(spec) for spec in artefact.outputs),
        options=dict(artefact.options),
    )


def _try_out(
    artefact: Artefact,
    region: Program,
    constants: Mapping[str, torch.Tensor],
    target: Target,
    path: str,
    notices: list[str],
) -> None:
    """An engine that is wrong is not published. One that this machine cannot run is said to be untried."""
    if target.device != "cpu" or missing_flags(target.isa):
        notice = f"the engines for {target.name} were not tried: this machine cannot run them"
        if notice not in notices:
            notices.append(notice)
        return
    device = torch.device("cpu")
    loaded = engine(artefact.backend)(artefact.directory, artefact.inputs, device)
    self_test(loaded, region, constants, device, path)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


# -- weights --


def weights_used(recording: Recording) -> dict[str, frozenset[str]]:
    """By component, the weights that programs read; the others serve `as_diffusers` only."""
    used: dict[str, set[str]] = {name: set() for name in recording.modules}
    for name, module in recording.modules.items():
        for program in module.programs.values():
            used[name].update(program.weights)
            for op in program.ops:
                if "region" in op.attrs:
                    instance, region = op.attrs["instance"], module.regions[op.attrs["region"]]
                    used[name].update(f"{instance}.{weight}" for weight in region.weights)
    for programs in recording.calls:
        for weight in (weight for program in programs.values() for weight in program.weights):
            component, _, name = weight.partition("/")
            used.setdefault(component, set()).add(name)
    return {name: frozenset(weights) for name, weights in used.items()}


def pack_weights(
    writer: BundleWriter, component: str, module: torch.nn.Module, packed: Packed, used: frozenset[str]
) -> tuple[GroupRow, ...]:
    """`weights/<component>/`: one file a group of blocks, one for the rest, one for what no program reads."""
    rows: list[GroupRow] = []
    for name, tensors in _groups(module, packed.offload, used).items():
        path = f"weights/{component}/{name}.safetensors"
        turned = sorted(key for key, tensor in tensors.items() if is_channels_last(tensor))
        packed.features |= {CHANNELS_LAST} if turned else set()
        flat = {key: as_stored(tensor) for key, tensor in tensors.items()}
        metadata = {"format": "pt"} | ({CHANNELS_LAST: json.dumps(turned)} if turned else {})
        safetensors.torch.save_file(flat, writer.path(path), metadata=metadata)
        writer.add(path, "weights")
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        rows.append(GroupRow(name=name, file=path, tensors=len(tensors), bytes=size))
    return tuple(rows)


def _groups(
    module: torch.nn.Module, offload: Offload | None, used: frozenset[str]
) -> dict[str, dict[str, torch.Tensor]]:
    together = offload.num_blocks_per_group if offload else 1
    blocks = [name for name, _ in repeated_blocks(module)]
    heads = {block: blocks[index - index % together] for index, block in enumerate(blocks)}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights_of(module):
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        key = UNUSED if name not in used else heads[block] if block else REST
        groups.setdefault(key, {})[name] = tensor.detach()
    return groups


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as its file holds it: in the order of its memory, [N, H, W, C] where channels are last."""
    return tensor.permute(0, 2, 3, 1) if is_channels_last(tensor) else tensor.contiguous()


# -- the manifest and what stands beside it --


def manifest_of(rows: tuple[FileRow, ...], packed: Packed, checked: Checked) -> Manifest:
    """The manifest of what was packed."""
    import diffusers

    offload = packed.offload.model_dump(mode="json", exclude_none=True) if packed.offload else None
    runtime: dict[str, Any] = {
        "device": checked.targets[0].device,
        "offload": offload,
        "on_incompatible": checked.spec.runtime.on_incompatible,
        "targets": {target.name: target.isa for target in checked.targets},
    }
    if checked.spec.runtime.tf32 is not None:
        runtime["tf32"] = checked.spec.runtime.tf32
    if packed.recording.reason:
        runtime["only_diffusers"] = packed.recording.reason
    major, minor = torch.__version__.split(".")[:2]
    return Manifest(
        features_required=tuple(sorted(packed.features)),
        source=checked.source.pinned(),
        requires=Requires(
            python=">=3.11",
            torch=f"=={major}.{minor}.*",
            cpu_isa=min(target.isa for target in checked.targets) if packed.engines else None,
            glibc=packed.glibc,
            packages=_packages(packed.recording),
        ),
        pipeline=Pipeline(
            class_name=checked.source.class_name,
            diffusers_version=diffusers.__version__,
            variants=tuple(packed.variants),
        ),
        files=rows,
        engines=tuple(packed.engines),
        passes=tuple(
            PassRow(name=step.name, version=step.version, options=step.options(), changed=ran.changed)
            for ran in checked.report
            for step in (ran.placed.step,)
        ),
        runtime=runtime,
        weights=dict(packed.weights),
    )


def _packages(recording: Recording) -> dict[str, str]:
    """Packages that the runtime needs beyond its own: ftfy, where the pipeline mends its prompts with it."""
    texts = [text for programs in recording.calls for program in programs.values() for text in program.texts]
    if not any("ftfy" in text["transforms"] for text in texts):
        return {}
    try:
        import ftfy  # noqa: F401
    except ImportError:
        raise MissingDependency("this pipeline mends its prompts with ftfy: pip install ftfy") from None
    return {"ftfy": ">=6.1"}


def pack_report(
    writer: BundleWriter, packed: Packed, source: SourceModel, report: Sequence[Ran], seconds: Mapping[str, float]
) -> None:
    """`build.json` and `README.md`: what differs from build to build, outside the id and the digests."""
    import diffusers

    build = {
        "diffkiln": diffkiln.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "host": {"machine": platform.machine(), "system": platform.platform()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1),
        "passes": [
            {"name": ran.placed.step.name, "notes": list(ran.notes), "seconds": round(ran.seconds, 3)} for ran in report
        ],
        "notices": packed.notices,
    }
    writer.write_unhashed("build.json", _json(build))
    writer.write_unhashed("README.md", _card(packed, source, report).encode())


def _card(packed: Packed, source: SourceModel, report: Sequence[Ran]) -> str:
    origin = source.origin.get("model") or source.origin.get("architecture") or "a local folder"
    size = sum(row.bytes for rows in packed.weights.values() for row in rows)
    lines = [
        "---",
        "library_name: diffkiln",
        "tags: [diffkiln, text-to-image, compiled]",
        "---",
        f"# {source.class_name}, compiled by diffkiln {diffkiln.__version__}",
        "",
        f"Made from {origin}. Weights: {size / 1e6:.1f} MB in {len(packed.weights)} components; "
        f"{len(packed.engines)} engines.",
        "",
        "    import diffkiln",
        '    pipe = diffkiln.load("this/folder")',
        '    image = pipe("a prompt").images[0]',
        "",
        "| variant | fixed |",
        "|---|---|",
    ]
    lines += [f"| {v.name} | `{json.dumps(v.fixed, sort_keys=True)}` |" for v in packed.variants]
    lines += ["", "| pass | component | what it did |", "|---|---|---|"]
    lines += [f"| {r.placed.step.name} | {r.placed.step.component} | {'; '.join(r.notes)} |" for r in report]
    lines += ["", *(f"- {notice}" for notice in packed.notices)]
    return "\n".join(lines) + "\n"


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
