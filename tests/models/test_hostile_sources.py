"""Sources of strangers whose numbers ask for more than any machine has are refused soon, in little memory."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffkiln.errors import LimitExceeded, SourceError
from diffkiln.models.checkpoint import read_header
from diffkiln.models.gguf_header import check_gguf
from diffkiln.spec.expressions import Expressions

MODEL = Path(__file__).parents[2] / "examples" / "digits" / "model"
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
DOUBLING = {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}
ADDED = {
    "id": 0,
    "content": "a",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}

#: file, what is changed in it, the error and what it says.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("transformer/config.json", {"num_layers": 10**7}, "LimitExceeded", "num_layers: modules is 10,000,000"),
    ("transformer/config.json", {"num_layers": 19_999}, "LimitExceeded", "component transformer: modules is 20,001"),
    ("text_encoder/config.json", {"max_position_embeddings": 2 * 10**9}, "SourceError", "text_encoder cannot be"),
    ("text_encoder/config.json", {"dtype": "load"}, "SourceError", "dtype is 'load', which is not a type of torch's"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "LimitExceeded", "timesteps is 10,000"),
    ("tokenizer/tokenizer.json", DOUBLING | {"added_tokens": [ADDED]}, "LimitExceeded", "its Replace can make over"),
    ("tokenizer/tokenizer.json", {"pre_tokenizer": 3}, "SourceError", "is not a tokenizer"),
    ("text_encoder/config.json", {"num_attention_heads": 0}, "SourceError", "component text_encoder cannot be loaded"),
]  # fmt: skip

CHECK = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import diffkiln, diffkiln.compiler.compile, diffusers, transformers
from diffkiln.errors import DiffkilnError
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
for model in sys.argv[1:]:
    spec = {"spec_version": 1, "source": {"model": model}, "target": {"device": "cpu"},
            "inputs": {"height": 32, "width": 32, "num_inference_steps": 2}}
    begun = time.process_time()
    try:
        diffkiln.check(spec)
        found = ["", ""]
    except DiffkilnError as error:
        found = [type(error).__name__, str(error)]
    print(json.dumps([*found, time.process_time() - begun]))
"""


@pytest.mark.slow
def test_configurations_that_ask_for_too_much_are_refused_soon_in_little_memory(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(CASES))]
    for folder, (file, changed, _, _) in zip(folders, CASES, strict=True):
        shutil.copytree(MODEL, folder)
        edited = json.loads((folder / file).read_text()) | changed
        (folder / file).write_text(json.dumps(edited))
    command = [sys.executable, "-c", CHECK, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line, (file, changed, kind, says) in zip(done.stdout.splitlines(), CASES, strict=True):
        name, message, seconds = json.loads(line)
        assert (name, says in message) == (kind, True), (file, list(changed), name, message)
        assert seconds < 60, (file, list(changed), seconds)


def safetensors_file(path: Path, header: dict[str, Any]) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def test_header_of_many_empty_rows_is_refused(tmp_path: Path) -> None:
    row = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    with pytest.raises(LimitExceeded, match="header_bytes is"):
        read_header(safetensors_file(tmp_path / "long.safetensors", {str(n): row for n in range(400_000)}))
    with pytest.raises(LimitExceeded, match="header_rows is 70,000, and 65,536 is allowed"):
        read_header(safetensors_file(tmp_path / "many.safetensors", {str(n): row for n in range(70_000)}))


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def gguf(tensors: int = 0, *values: bytes, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, len(values)) + b"".join(values)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return text(b"key") + struct.pack("<IIQ", 9, kind, count) + data


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (gguf(0, array(0, 10**8)), LimitExceeded, "gguf_values is 100,000,001, and 2,000,000 is allowed"),
        (gguf(0, array(8, 2**63)), LimitExceeded, "gguf_values is"),
        (gguf(10**12), LimitExceeded, "header_rows is 1,000,000,000,000"),
        (gguf(0, text(b"a" * 10)[:9] + b"\xff" * 8), SourceError, "cut short|no GGUF|type"),
        (gguf(0, struct.pack("<Q", 2**62)), LimitExceeded, "json_bytes is"),
        (gguf(0, array(9, 3)), SourceError, "a value of the type 9"),
        (gguf(1, version=9), SourceError, "not a GGUF file of version 2 or 3"),
        (b"GGUF", SourceError, "cut short or is not a GGUF file"),
        (gguf(1) + text(b"w") + struct.pack("<I", 2**31), SourceError, "2147483648 dimensions"),
    ],
)
def test_gguf_header_that_asks_for_too_much_is_refused(tmp_path: Path, data: bytes, error: type, says: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=says):
        check_gguf(path)


def test_expression_that_never_ends_is_refused() -> None:
    from diffkiln.guards.limits import Limits, applied

    with applied(Limits(regex_seconds=0.2)):
        slow = Expressions([r"(a|a)*[!?]"])
        with pytest.raises(LimitExceeded, match=r"takes over 0\.2 seconds for the names of the layers"):
            slow.found_in("a" * 100)


def test_expressions_are_those_of_python() -> None:
    found: Callable[[str], bool] = Expressions([r"norm$", r"^proj_(in|out)\b"]).found_in
    assert [found(name) for name in ("a.norm", "normal", "proj_out", "x.proj_out")] == [True, False, True, False]
    for wrong in ("(", "a" * 2000):
        with pytest.raises(ValueError, match=r".+"):
            Expressions([wrong])


def test_length_that_no_memory_holds_is_refused_before_the_tokenizer_pads_to_it() -> None:
    """The library ends the process where it cannot have the memory, so it must not be called at all."""
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensorMode

    from diffkiln.record.constants import Constants
    from diffkiln.record.tape import Tape
    from diffkiln.record.text import TextRecorder

    def original(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the tokenizer was called")

    tokenizer = SimpleNamespace(model_max_length=10**12)
    recorder = TextRecorder(Tape(FakeTensorMode(), Constants()), {}, {id(tokenizer): "tokenizer_2"})
    for given in ({}, {"max_length": 2**33}):
        with pytest.raises(LimitExceeded, match=r"tokenizer_2, model_max_length: tokens is \d+(,\d+)+, and 262,144"):
            recorder(tokenizer, original, ["a prompt"], padding="max_length", **given)
