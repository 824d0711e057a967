"""Every spec in the repository: of the examples, the documents, the benchmarks, and what is frozen."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from diffkiln.spec.choices import chooses
from tests.conftest import DIGITS
from tests.docs.examples import DOCUMENTS, ROOT, blocks, values
from tests.frozen.kinds import KINDS

Specs = Mapping[str, Mapping[str, Any]]


def every_spec() -> dict[str, Mapping[str, Any]]:
    """Returns each spec by the name of its golden file."""
    found = {f"digits/{path.stem}": json.loads(path.read_text()) for path in sorted(DIGITS.glob("*.json"))}
    found |= {f"examples/{path.stem}": json.loads(path.read_text()) for path in ready_specs()}
    found |= {f"frozen/{name}": kind.spec for name, kind in KINDS.items()}
    return found | _of_documents() | _of_benchmarks()


def ready_specs() -> list[Path]:
    return sorted((ROOT / "examples" / "specs").glob("*.json"))


def _of_documents() -> Specs:
    """The JSON examples that are whole specs, numbered within their document."""
    found: dict[str, Mapping[str, Any]] = {}
    for document in DOCUMENTS:
        shown = [value for block in blocks(document) if block.language == "json" for value in values(block)]
        whole = [value for value in shown if "spec_version" in value and not chooses(value)]
        found |= {f"docs/{document.stem}-{number}": value for number, value in enumerate(whole)}
    return found


def _of_benchmarks() -> Specs:
    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT, ROOT / "benchmarks"):
            patch.syspath_prepend(str(folder))
        return {f"benchmarks/{name}": spec for name, spec in _benchmarks()}


def _benchmarks() -> Iterable[tuple[str, Mapping[str, Any]]]:
    footprint, full_size, pairs = map(import_module, ("footprint", "full_size", "pairs"))
    yield "footprint-flux", footprint.FLUX
    yield "footprint-sd", footprint.SD
    yield from ((f"footprint-{_plain(name)}", spec) for name, (spec, _) in footprint.CHECKED.items())
    yield "full_size", full_size.spec(list(full_size.TARGETS))
    options = Namespace(dtype="bfloat16", height=1024, width=1024)
    yield "from_configuration", import_module("from_configuration").spec(options)
    ways = import_module("gpu.ways")
    setting = ways.Setting(Path(), rehearse=False)
    yield from ((f"gpu-{name}", ways.spec_of(name, setting)) for name in ways.BUNDLES)
    for name, entries in (*pairs.DIGITS_PAIRS, *pairs.SDXL_PAIRS):
        yield f"pairs-{_plain(name)}", pairs.digits_spec(_for("transformer", entries))
    parts = import_module("parts")
    for name, entries in (parts.PARTS | parts.GUIDED).items():
        yield f"parts-{_plain(name)}", pairs.digits_spec(entries)
    for name, pipeline in import_module("peers.pipelines").MID.items():
        yield f"peers-{name}", pairs.digits_spec(pipeline.passes)


def _for(component: str, entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries with what the benchmark adds before it compiles them."""
    adapters = {"fuse_lora": {"adapters": [{"file": "adapter.safetensors", "scale": 1.0}]}}
    return [{"component": component, **adapters.get(entry["name"], {}), **entry} for entry in entries]


def _plain(name: str) -> str:
    """A name for a file."""
    return "-".join("".join(char if char.isalnum() else " " for char in name.lower()).split())
