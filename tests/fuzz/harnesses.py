"""What is fuzzed: for each kind of hostile input a function of bytes that lets only our own refusals pass.

Anything else that a harness raises is a finding: an exception that is not ours, or an assertion that what was
accepted is safe.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import torch

from diffkiln.bundle import check_path, check_unique, dump_manifest, parse_manifest
from diffkiln.bundle.layout import CONSTANTS
from diffkiln.errors import DiffkilnError, PathEscape
from diffkiln.guards.printable import markdown, markdown_code, printable, printable_json
from diffkiln.guards.tokenizing import BoundedTokenizer
from diffkiln.interpreter.aten import Interpreter
from diffkiln.models.adapters import check_adapter
from diffkiln.models.gguf_header import check_gguf
from diffkiln.program import Module, Program, fingerprint, program_from_json, program_to_json, verify
from diffkiln.program.inference import infer_types
from diffkiln.program.memory import peak_memory
from diffkiln.program.operators import nbytes
from diffkiln.runtime.compatibility import check_manifest
from diffkiln.runtime.opening import read_constants, read_modules, read_variant
from diffkiln.runtime.tables import read_header
from diffkiln.runtime.targets import choose_target
from diffkiln.runtime.variants import CompiledVariant
from diffkiln.serving.files import decode
from diffkiln.serving.offer import Offer
from diffkiln.serving.refusals import Refusal
from diffkiln.serving.requests import MAX_SEED, body_for, order_of, read_json
from diffkiln.serving.settings import Settings
from diffkiln.spec import parse_spec
from tests.fuzz import bundles, directories, mutate
from tests.interpreter.hostile import BYTES, values_of

CORPUS = Path(__file__).with_name("corpus")


@dataclass(frozen=True)
class Harness:
    """`run` is given bytes; `mutate` changes an input by a seed and keeps its form."""

    run: Callable[[bytes], None]
    mutate: Callable[[bytes, int], bytes]


class Held:
    """As much of a verified bundle as readers of single files ask for."""

    def __init__(self, files: dict[str, bytes], programs: dict[str, str] | None = None) -> None:
        self.data = files
        variant = SimpleNamespace(name="v0", fixed={}, programs=programs or {})
        rows = [SimpleNamespace(path=path, role="program") for path in files]
        self.manifest: Any = SimpleNamespace(files=rows, pipeline=SimpleNamespace(variants=(variant,)))

    def size(self, path: str) -> int:
        return len(self.data[path])

    def read(self, path: str) -> bytes:
        return self.data[path]

    def peek(self, path: str, size: int, offset: int = 0) -> bytes:
        return self.data[path][offset : offset + size]


def spec(data: bytes) -> None:
    """What is accepted says the same in its JSON form."""
    try:
        read = parse_spec(data)
    except DiffkilnError as error:
        str(error).encode()
        return
    assert parse_spec(json.dumps(read.as_json()).encode()) == read


def manifest(data: bytes) -> None:
    """What is accepted can be written again, and asked what loading asks of it before any file is read."""
    try:
        read = parse_manifest(data)
        assert parse_manifest(dump_manifest(read)) == read
        check_manifest(read)
        choose_target(read, torch.device("cpu"))
    except DiffkilnError as error:
        str(error)


def paths(data: bytes) -> None:
    """One path a line. What is accepted stays inside, here and on Windows, and is one file."""
    accepted = []
    for text in data.decode("utf-8", "surrogateescape").split("\n"):
        try:
            path = check_path(text)
        except PathEscape as error:
            str(error)
            continue
        assert str(path) == text
        assert os.path.normpath(f"/bundle/{text}") == f"/bundle/{text}"
        windows = PureWindowsPath(text)
        assert not windows.anchor
        assert not windows.is_reserved()
        assert ".." not in windows.parts
        accepted.append(text)
    try:
        check_unique(accepted)
    except PathEscape:
        return
    assert len({text.lower() for text in accepted}) == len(accepted)


def weights(data: bytes) -> None:
    """Every tensor of a header that is accepted can be made of the file's bytes."""
    try:
        entries, offset, nbytes = read_header(Held({"w": data}), "w")  # type: ignore[arg-type]
    except DiffkilnError as error:
        str(error)
        return
    assert offset + nbytes == len(data)
    flat = torch.zeros(nbytes, dtype=torch.uint8)
    for entry in entries.values():
        entry.of(flat[entry.start : entry.end])


def constants(data: bytes) -> None:
    try:
        read_constants(Held({CONSTANTS: data}))  # type: ignore[arg-type]
    except DiffkilnError as error:
        str(error)


def programs(data: bytes) -> None:
    """`{"transformer": <a component's file>, "call": <a variant's file>}`, read as loading reads the two."""
    try:
        parts = json.loads(data)
        files = {name: json.dumps(parts[name]).encode() for name in ("transformer", "call")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # not an input of this harness
    named = {f"programs/{name}.json": text for name, text in files.items()}
    held: Any = Held(named, {"call": "programs/call.json"})
    try:
        modules = read_modules(held)
        variant = read_variant(held, 0, modules)
    except DiffkilnError as error:
        str(error)
        return
    for program in (*variant.programs.values(), *_programs_of(modules)):
        assert fingerprint(program_from_json(program_to_json(program))) == fingerprint(program)
        assert program.weights is not None


def operations(data: bytes) -> None:
    """A region's program, run on hostile values if it is accepted: it ends, by an error of ours or by its results."""
    try:
        program = program_from_json(json.loads(data))
        verify(program)
        infer_types(program)
        if len(program.ops) > 50 or peak_memory(program).nbytes > BYTES or _given(program) > BYTES:
            return
    except (DiffkilnError, ValueError, RecursionError) as error:
        str(error)
        return
    rng = random.Random(data)
    inputs = [values_of(item.type, rng) for item in program.inputs]
    weights = {name: values_of(program.types[f"@{name}"], rng) for name in program.weights}
    constants = {key: values_of(program.types[f"#{key}"], rng) for key in program.constants}
    try:
        with torch.inference_mode():
            Interpreter(program, paranoid=True, explain=True)(inputs, weights, constants)
    except DiffkilnError as error:
        str(error)


def _given(program: Program) -> int:
    names = {item.name for item in program.inputs} | {name for name in program.types if name.startswith(("@", "#"))}
    return sum(nbytes(program.types[name]) for name in names)


def tokenizers(data: bytes) -> None:
    """What is accepted tokenizes a prompt, or refuses it."""
    try:
        bounded = BoundedTokenizer(data, "text/tokenizer.json")
        bounded.admit("a  black CAT\u00e9 " * 4)
        bounded.run(lambda: bounded.tokenizer.encode("a  black CAT\u00e9 " * 4))
    except DiffkilnError as error:
        str(error).encode()


def gguf(data: bytes) -> None:
    """The header of a GGUF file."""
    _in_a_file(data, check_gguf)


def adapters(data: bytes) -> None:
    """The header of an adapter, as an attacker writes it."""
    _in_a_file(data, check_adapter)


def _in_a_file(data: bytes, check: Callable[[Path], None]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        try:
            check(Path(file.name))
        except DiffkilnError as error:
            str(error).encode()


def strings(data: bytes) -> None:
    """Whatever a string holds, a terminal, a log and a card show it, and nothing in it acts."""
    text = data.decode("utf-8", "surrogateescape")
    for shown in (printable(text), markdown(text), markdown_code(text), str(DiffkilnError(text))):
        shown.encode()
        assert not any(hidden in shown for hidden in "\x1b\x9b\u202e\u2066\u200b")
    assert "<" not in markdown(text).replace("<!-- -->", "")
    json.loads(printable_json({text: [text]}))


def requests(data: bytes) -> None:
    """A body becomes an order that the bundle serves, or is refused with a reason that shows what it quotes."""
    try:
        order = order_of(read_json(_BODY, data), _OFFER, "id", {})
        choice = _OFFER.choose(order.asked, "negative_prompt" in order.prompts)
    except Refusal as refusal:
        _check_refusal(refusal)
        return
    assert 1 <= order.count <= Settings.images
    assert 0 <= order.seed <= MAX_SEED
    assert choice.keywords["width"] == 32


def _check_refusal(refusal: Refusal) -> None:
    assert refusal.status == 400
    assert printable(refusal.reason) == refusal.reason
    json.dumps(refusal.body).encode()


def uploads(data: bytes) -> None:
    """A file becomes an image of no more pixels than are allowed, or is refused."""
    try:
        image = decode(data, "image", 4_096)
    except Refusal as refusal:
        _check_refusal(refusal)
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= 4_096


_CALL: Any = SimpleNamespace(texts=(), inputs=(), ops=(), signature={})
_FIXED = {"width": 32, "height": 32, "num_inference_steps": 4}
_OFFER = Offer("digits", "0" * 64, "FluxPipeline", (CompiledVariant("32x32", _FIXED, {"call": _CALL}),))
_BODY = body_for([_OFFER], Settings(), "ImageRequest")


def _programs_of(modules: dict[str, Module]) -> list[Any]:
    return [program for module in modules.values() for program in (*module.programs.values(), *module.regions.values())]


HARNESSES: dict[str, Harness] = {
    "spec": Harness(spec, mutate.json_text),
    "manifest": Harness(manifest, mutate.json_text),
    "paths": Harness(paths, mutate.some_bytes),
    "weights": Harness(weights, mutate.safetensors_file),
    "constants": Harness(constants, mutate.safetensors_file),
    "programs": Harness(programs, mutate.json_text),
    "operations": Harness(operations, mutate.json_text),
    "engines": Harness(directories.run, mutate.some_bytes),
    "bundles": Harness(bundles.run, mutate.some_bytes),
    "tokenizers": Harness(tokenizers, mutate.json_text),
    "gguf": Harness(gguf, mutate.some_bytes),
    "adapters": Harness(adapters, mutate.safetensors_file),
    "strings": Harness(strings, mutate.some_bytes),
    "requests": Harness(requests, mutate.json_text),
    "uploads": Harness(uploads, mutate.some_bytes),
}


def corpus(name: str) -> list[Path]:
    """The inputs that are kept for a harness."""
    return sorted((CORPUS / name).iterdir())
