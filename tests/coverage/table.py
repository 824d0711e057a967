"""docs/coverage.md, from the results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.coverage.measure import RESULTS
from tests.coverage.registry import CASES, GROUPS, Case

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
#: Column by column: a backend and what the table calls it. TensorRT-RTX engines are built and not run.
BACKENDS = {"aot_inductor": "AOTInductor", "onnx": "ONNX Runtime", "tensorrt": "TensorRT-RTX"}
_TITLES = {
    "transformer": "Transformers",
    "unet": "U-Nets",
    "autoencoder": "Decoders of autoencoders",
    "text encoder": "Text encoders",
}
_HEAD = """# Coverage

What diffkiln compiles, class by class. `make coverage` measures it and writes this page; nothing here is written by
hand. Every class is built on a tiny configuration with random weights (`tests/coverage`), recorded, lowered for
`cpu-x86-64-v3`, and called on two sets of numbers. *engines, difference* says how many engines it became and how far
the result is from diffusers' own, relative to its norm: at most 1e-4 counts as compiled. TensorRT's engines are built
for SM 8.9 by TensorRT for RTX and have not been run. A dash is not measured.

*Compiled* says what became engines: `blocks`, the classes of `_repeated_blocks`, with the rest replayed operation by
operation; `whole`, everything in one. *QKV* says whether `fuse_qkv` is real there: fused, the originals deleted, and
the same result. *Sizes* says how many regions are the same program at twice the height or length but for numbers that
follow their inputs, so that one engine may serve a range of sizes. *Fixed* are inputs whose values decide shapes or the
way through the code: they are folded, as a pipeline's call folds them (`compile_module(…, fixed=…)`).
"""
_CALLS = """
## Calls

Whole pipelines, from text, and from images where the call takes them, to an image or a video: recorded without weights,
packed into a bundle, loaded, and compared with diffusers. A *program* gives the same bits where the constants of both
are computed alike ([why](bundle.md#what-the-id-depends-on)), or, where prompts are padded to a fixed length, the same
within 1e-5; its operations are counted over the call and all components. What cannot be recorded runs *as diffusers*,
if the spec allows it (`runtime.on_unrecordable`); the reason is what diffkiln says of it.
"""
_COMPILED = """
## Compiled pipelines

Whole pipelines whose denoiser's blocks are compiled by AOTInductor, and, of those that take images, the whole
autoencoder and ControlNet: built, loaded in a fresh process that imports neither diffusers nor transformers, and
compared with what diffusers draws, relative to its norm.
"""


def document() -> str:
    """The page that the committed results give."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in CASES if _measured(name)}
    parts = [_HEAD, _summary(results)]
    for group in GROUPS:
        cases = sorted((case for case in CASES.values() if case.group == group), key=lambda case: case.name)
        parts.append(f"\n## {_TITLES[group]}\n\n{_modules(cases, results)}")
    return "".join([*parts, _CALLS, "\n", _calls(), _COMPILED, "\n", _compiled()])


def calls() -> dict[str, dict[str, Any]]:
    """What became of each pipeline's call."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "calls").glob("*.json"))}


def _measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def _summary(results: Mapping[str, Any]) -> str:
    lines = ["", "| | classes |", "|---|---|"]
    for group in GROUPS:
        names = [case.name for case in CASES.values() if case.group == group]
        counts = [
            f"{title} {done} of {len(names)}"
            for backend, title in BACKENDS.items()
            if (done := sum(_works(results.get(name, {}), backend) for name in names))
        ]
        lines.append(f"| {_TITLES[group]} | {', '.join(counts) or '–'} |")
    found = calls().values()
    programs = sum("diffusers" not in result for result in found)
    done = sum("engines" in result for result in compiled().values())
    lines.append(f"| Pipelines with a compiled denoiser | {done} of {len(compiled())} |")
    lines.append(f"| Calls of pipelines | as programs {programs} of {len(found)} |")
    return "\n".join([*lines, ""])


def _works(result: Mapping[str, Any], backend: str) -> bool:
    return "engines" in result.get("backends", {}).get(backend, {})


def _modules(cases: Iterable[Case], results: Mapping[str, Any]) -> str:
    titles = ["class", "compiled", *BACKENDS.values(), "QKV", "sizes", "notes"]
    lines = [_row(titles), _row(["---"] * len(titles))]
    for case in cases:
        result = results.get(case.name, {})
        engines = [_engines(result.get("backends", {}).get(backend)) for backend in BACKENDS]
        notes = [case.note, f"fixed: {', '.join(f'`{name}`' for name in case.fixed)}" if case.fixed else ""]
        notes += [f"{BACKENDS[key]}: {text}" for key, text in _failures(result)]
        known = [result.get("qkv") or "–", result.get("sizes") or "–"]
        lines.append(_row([f"`{case.name}`", case.scope, *engines, *known, "; ".join(filter(None, notes))]))
    return "\n".join([*lines, ""])


def _engines(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    told = [str(found[key]) for key in ("engines", "difference") if key in found]
    return ", ".join(told) if "engines" in found else "no"


def _failures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = result.get("backends", {})
    return [(key, found[key]["failure"]) for key in BACKENDS if "failure" in found.get(key, {})]


def _calls() -> str:
    lines = [_row(["pipeline", "from", "to", "runs as", "operations or reason"]), _row(["---"] * 5)]
    for result in sorted(calls().values(), key=lambda result: (result["class"], result.get("takes", []))):
        reason = result.get("diffusers")
        equal = "" if result.get("equal", True) else " (within 1e-5)"
        told = reason if reason else f"{result['operations']}{equal}"
        kind = "video" if result["video"] else "image"
        given = ", ".join(["text", *(f"`{keyword}`" for keyword in result.get("takes", []))])
        lines.append(_row([f"`{result['class']}`", given, kind, "diffusers" if reason else "a program", told]))
    return "\n".join([*lines, ""])


def compiled() -> dict[str, dict[str, Any]]:
    """What became of each pipeline whose denoiser was compiled."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "compiled").glob("*.json"))}


def _compiled() -> str:
    lines = [_row(["pipeline", "engines", "difference"]), _row(["---"] * 3)]
    for result in sorted(compiled().values(), key=lambda result: result["class"]):
        cells = [str(result["engines"]), result["difference"]] if "engines" in result else ["–", result["failure"]]
        lines.append(_row([f"`{result['class']}`", *cells]))
    return "\n".join([*lines, ""])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
