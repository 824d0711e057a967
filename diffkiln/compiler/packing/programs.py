"""`programs/` and `text/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch

from diffkiln.bundle import BundleWriter, Variant
from diffkiln.bundle.layout import CONSTANTS, SCHEMAS, program_file, tokenizer_file
from diffkiln.compiler.packed import Packed, as_json
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.tokenizers import tokenizers_of
from diffkiln.interpreter.aten import schemas
from diffkiln.program import NOISE, Program, dumps, module_to_json, program_to_json
from diffkiln.program.images import image_keywords
from diffkiln.program.text_rules import COUNTED, FORBIDDEN, FORMS, RULES
from diffkiln.record.call import Request, defaults
from diffkiln.record.pipeline import Recording
from diffkiln.record.sentinels import each_size


def pack_programs(writer: BundleWriter, plan: Plan) -> Packed:
    """Writes `programs/` (variants, components, operators' schemas) but for its constants, and `text/` (tokenizers)."""
    recording = plan.recording
    packed = Packed()
    for index, (name, request) in enumerate(zip(variant_names(plan.requests), plan.requests, strict=True)):
        fixed = recording.fixed[index] if recording.fixed else defaults(plan.pipe, request)
        packed += _pack_variant(writer, name, fixed, recording.calls[index] if recording.calls else {})
    for component, module in recording.modules.items():
        writer.write(program_file(component), dumps(module_to_json(module)), "program")
    if recording.calls:
        every = every_program(recording)
        writer.write(SCHEMAS, as_json(schemas(every)), "program")
        for name, text in tokenizers_of(recording, plan.pipe).items():
            writer.write(tokenizer_file(name), text.encode(), "config")
    return packed


def pack_constants(writer: BundleWriter, recording: Recording) -> None:
    """Writes the constants of `programs/`, which are all known once the weights were there."""
    if recording.calls:
        keys = sorted({key for program in every_program(recording) for key in program.constants})
        constants = {key: recording.constants.tensors[key] for key in keys}
        writer.write(CONSTANTS, safetensors.torch.save(constants), "program")


def _pack_variant(writer: BundleWriter, name: str, fixed: Mapping[str, Any], programs: Mapping[str, Program]) -> Packed:
    path = program_file(name)
    if programs:
        free = {item.source["keyword"] for item in programs["call"].inputs if item.source.get("kind") == "scalar"}
        fixed = {key: value for key, value in fixed.items() if key not in free}
        data = {"programs": {key: program_to_json(program) for key, program in programs.items()}}
        writer.write(path, dumps(data), "program")
    features = frozenset(feature for program in programs.values() for feature in _features(program))
    return Packed((Variant(name=name, fixed=dict(fixed), programs=dict.fromkeys(programs, path)),), features=features)


#: The parts of a resizing in two steps; one in a single step has no gap.
_WITH_GAP = 5


def _features(call: Program) -> Iterator[str]:
    """Yields the features that a runtime must know to run a call."""
    if image_keywords(call.inputs):
        yield "image_inputs"
    if any(
        len(edit) == _WITH_GAP for item in call.inputs for edit in item.source.get("edits", ()) if edit[0] == "resize"
    ):
        yield "two_step_resize"
    if any(item.source.get("kind") == "tensor" and item.source["keyword"] != "latents" for item in call.inputs):
        yield "tensor_inputs"
    if len(call.outputs) > 1 or "form" in call.signature:
        yield "results"
    if not all(op.attrs.get("seeded", True) for op in call.ops if op.name == NOISE):
        yield "unseeded_noise"
    if any("distribution" in op.attrs for op in call.ops if op.name == NOISE):
        yield "distributions"
    for text in call.texts:
        yield from {*RULES, *FORBIDDEN, *FORMS, COUNTED} & text.keys()


def every_program(recording: Recording) -> list[Program]:
    """Returns the programs of calls, components and regions."""
    calls = [program for programs in recording.calls for program in programs.values()]
    parts = [p for m in recording.modules.values() for p in (*m.programs.values(), *m.regions.values())]
    return calls + parts


def _steps(fixed: Mapping[str, Any]) -> list[str]:
    """Returns the number of steps, if there is one: a schedule of one's own, such as `sigmas`, counts them itself."""
    own = (fixed.get(name) for name in ("sigmas", "timesteps"))
    count = next((len(values) for values in own if isinstance(values, list | tuple)), fixed.get("num_inference_steps"))
    return [f"{count}-steps"] if count else []


def variant_names(requests: Sequence[Request]) -> list[str]:
    """Returns the name of each variant, all different."""
    names: list[str] = []
    for request in requests:
        names.append(_variant_name(request, set(names)))
    return names


def _variant_name(request: Request, taken: set[str]) -> str:
    fixed = request.fixed
    sizes = [str(fixed[key]) for key in ("height", "width", "num_frames") if fixed.get(key)]
    if not sizes and request.images:  # those of its images
        width, height = next(size for sizes in request.images.values() for size in each_size(sizes))
        sizes = [str(height), str(width)]
    name = "-".join(["x".join(sizes)] * bool(sizes) + _steps(fixed)) or "call"
    if request.batch_size > 1:
        name += f"-batch-{request.batch_size}"
    if fixed.get("num_images_per_prompt", 1) > 1:
        name += f"-images-{fixed['num_images_per_prompt']}"
    if request.tokens is not None:
        counts = [request.tokens[keyword] for keyword in ("prompt", "negative_prompt") if keyword in request.tokens]
        name += f"-tokens-{'-'.join(map(str, counts))}"
    return name if name not in taken else f"{name}-{len(taken) + 1}"
