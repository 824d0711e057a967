"""`programs/` and `text/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import safetensors.torch

from diffkiln.bundle import BundleWriter, Variant
from diffkiln.bundle.layout import CONSTANTS, SCHEMAS
from diffkiln.compiler.packing.packed import Packed, as_json
from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import schemas
from diffkiln.program import NOISE, Program, dumps, module_to_json, program_to_json
from diffkiln.program.images import image_keywords
from diffkiln.program.text_rules import RULES
from diffkiln.record.call import Request, defaults
from diffkiln.record.pipeline import Recording
from diffkiln.record.text import tokenizer_of


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
            packed.features.update(*map(_features, programs.values()))
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
        writer.write(SCHEMAS, as_json(schemas(every)), "program")
        for name, text in tokenizers_of(recording, pipe).items():
            writer.write(f"text/{name}.json", text.encode(), "config")


def _features(call: Program) -> Iterator[str]:
    """What a runtime must know to run a call."""
    if image_keywords(call.inputs):
        yield "image_inputs"
    if not all(op.attrs.get("seeded", True) for op in call.ops if op.name == NOISE):
        yield "unseeded_noise"
    for text in call.texts:
        yield from RULES.keys() & text.keys()


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
    return {name: _tokenizer_json(name, tokenizer_of(pipe.components[name])) for name in sorted(names)}


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
    if not sizes:  # those of its images
        width, height = next(size if isinstance(size[0], int) else size[0] for size in request.images.values())
        sizes = [str(height), str(width)]
    name = "x".join(sizes) + f"-{fixed['num_inference_steps']}-steps"
    if request.batch_size > 1:
        name += f"-batch-{request.batch_size}"
    if fixed.get("num_images_per_prompt", 1) > 1:
        name += f"-images-{fixed['num_images_per_prompt']}"
    return name if name not in taken else f"{name}-{len(taken) + 1}"
