"""docs/coverage.md, from the results."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers

from tests.coverage.calls.classes import NOT_BUILT, exported
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
## Every pipeline

Every class of a pipeline that diffusers {version} exports, on a tiny model with random weights (`tests/pipelines`,
`tests/coverage/calls`): recorded without weights, packed into a bundle, loaded, and compared with diffusers for two
prompts and two seeds. A *program* is within 1e-5 of diffusers in float32; its operations are counted over the call and
all components. Where shapes follow the prompt's length, there is a program for each (`prompt_tokens`). What cannot be
recorded runs *as diffusers*, if the spec allows it (`runtime.on_unrecordable`); the reason is what diffkiln says of it.
*Refused* is what diffkiln does not run at all. *Not built* has no tiny model here, and *not measured* has one and no
result yet.

"""
_REASONS = """
The reasons, by the number of classes:

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
    head = _CALLS.format(version=diffusers.__version__)
    return "".join([*parts, head, _calls(), _REASONS, _reasons(), _COMPILED, "\n", _compiled()])


def calls() -> dict[str, dict[str, Any]]:
    """What became of each pipeline's call."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "calls").glob("*.json"))}


def _measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def _summary(results: Mapping[str, Any]) -> str:
    lines = ["", "| | classes |", "|---|---|"]
    for group in GROUPS:
        names = [case.name for case in CASES.values() if case.group == group]
        shares = [
            f"{title} {done} of {len(names)}"
            for backend, title in BACKENDS.items()
            if (done := sum(_works(results.get(name, {}), backend) for name in names))
        ]
        lines.append(f"| {_TITLES[group]} | {', '.join(shares) or '–'} |")
    done = sum("engines" in result for result in compiled().values())
    lines.append(f"| Pipelines with a compiled denoiser | {done} of {len(compiled())} |")
    told = ", ".join(f"{kind} {count}" for kind, count in counts().items())
    lines.append(f"| Pipelines, all {len(exported())} | {told} |")
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


def standing(result: Mapping[str, Any]) -> str:
    """What became of a pipeline's call: "a program", "diffusers" or "refused"."""
    return "refused" if "refused" in result else "diffusers" if "diffusers" in result else "a program"


def counts() -> dict[str, int]:
    """How many classes run as what; a class with several calls as the best of them."""
    order = ("a program", "diffusers", "refused")
    best: dict[str, str] = {}
    for result in calls().values():
        name, found = result["class"], standing(result)
        best[name] = min(best.get(name, found), found, key=order.index)
    found = {key: sum(standing == key for standing in best.values()) for key in order}
    missing = len(exported() - best.keys() - NOT_BUILT.keys())
    return found | ({"not measured": missing} if missing else {}) | {"not built": len(NOT_BUILT)}


def _calls() -> str:
    lines = [_row(["pipeline", "from", "to", "runs as", "operations or reason"]), _row(["---"] * 5)]
    rows = [(result["class"], _call_row(result)) for result in calls().values()]
    rows += [(name, _row([f"`{name}`", "", "", "not built", reason])) for name, reason in NOT_BUILT.items()]
    unknown = exported() - {name for name, _ in rows}
    rows += [(name, _row([f"`{name}`", "", "", "not measured", "run `make coverage`"])) for name in unknown]
    return "\n".join([*lines, *(row for _, row in sorted(rows)), ""])


def _call_row(result: Mapping[str, Any]) -> str:
    given = ", ".join([*["text"] * result["text"], *(f"`{keyword}`" for keyword in result.get("takes", []))])
    told = str(result.get("refused") or result.get("diffusers") or result["operations"])
    told += ", a program for each length of the prompt" if result.get("by_length") else ""
    told = told.replace("[", chr(92) + "[")  # brackets of code are no links
    return _row([f"`{result['class']}`", given, result["gives"], standing(result), told])


def _reasons() -> str:
    """Why calls are no programs, without what is particular to each class."""
    found = Counter(_reason(result) for result in calls().values() if "diffusers" in result)
    lines = [_row(["reason", "classes"]), _row(["---"] * 2)]
    return "\n".join([*lines, *(_row([reason, str(count)]) for reason, count in found.most_common()), ""])


def _reason(result: Mapping[str, Any]) -> str:
    """The reason that diffkiln gives, with the names in it left out."""
    text = (
        str(result["diffusers"]).removeprefix(f"{result['class']} cannot be recorded: ").split(" To make a bundle ")[0]
    )
    text = text.replace(result["class"], "the pipeline").replace("the call of the pipeline failed", "the call failed")
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "…", text)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text)[:160]


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
