"""The page says what was measured, of every class there is; and a few classes are measured in every run."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers
import pytest

from tests.coverage import CASES, GROUPS
from tests.coverage.calls import CALLS
from tests.coverage.calls.compiled import COMPILED
from tests.coverage.calls.measure import measure_call
from tests.coverage.measure import RESULTS, read, run
from tests.coverage.table import DOCUMENT, calls, compiled, document
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
#: What a run can afford: a block by either backend, inputs that are folded, and a text encoder.
SAMPLE = [
    ("MiniMaxMusic3Transformer1DModel", "aot_inductor"),
    ("MiniMaxH3Transformer3DModel", "onnx"),
    ("T5EncoderModel", "onnx"),
]


def classes_with_repeated_blocks() -> set[str]:
    """By reading diffusers' code, which is quicker than importing it."""
    assert diffusers.__file__
    found = set()
    for path in (Path(diffusers.__file__).parent / "models").rglob("*.py"):
        text = path.read_text()
        items = ast.parse(text).body if "    _repeated_blocks = [" in text else []
        found |= {item.name for item in items if isinstance(item, ast.ClassDef) and _has_repeated_blocks(item)}
    return found


def _has_repeated_blocks(item: ast.ClassDef) -> bool:
    assigned = [line for line in item.body if isinstance(line, ast.Assign) and isinstance(line.value, ast.List)]
    named = [line for line in assigned if any(ast.unparse(target) == "_repeated_blocks" for target in line.targets)]
    return any(line.value.elts for line in named)  # type: ignore[attr-defined]


def test_every_class_with_repeated_blocks_is_measured():
    names = " ".join(sorted(classes_with_repeated_blocks() - CASES.keys()))
    assert not names, f"describe {names} in tests/coverage, and run: python -m tests.coverage {names}"


def test_every_result_is_of_a_case():
    assert {path.stem for path in RESULTS.glob("*.json")} <= CASES.keys()
    assert calls().keys() <= CALLS.keys()


def test_the_page_is_what_the_results_give():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: python -m tests.coverage --page"


def counted(group: str, backend: str) -> int:
    cases = [case for case in CASES.values() if case.group == group]
    return sum("engines" in read(case.name).get("backends", {}).get(backend, {}) for case in cases)


@pytest.mark.parametrize("group", ["transformer", "unet", "text encoder"])
def test_every_class_is_compiled(group):
    assert counted(group, "aot_inductor") == sum(case.group == group for case in CASES.values())


def test_nearly_every_class_is_an_onnx_model():
    """But two that compute in bfloat16 whatever they are given, and one that slices beyond its tokens."""
    assert sum(counted(group, "onnx") for group in GROUPS) >= len(CASES) - 3


def test_nearly_every_transformer_is_an_engine_of_tensorrt():
    assert counted("transformer", "tensorrt") >= 39


def test_most_calls_are_programs():
    assert sum("diffusers" not in result for result in calls().values()) >= 81
    assert sum("diffusers" not in result for result in calls().values() if result.get("takes")) >= 36


def test_the_readme_counts_as_the_page_does():
    found = calls().values()
    programs = sum("diffusers" not in result for result in found)
    assert f"{programs} of the {len(found)} pipelines" in (DOCUMENT.parents[1] / "README.md").read_text()


def test_pipelines_are_compiled():
    assert set(COMPILED) == compiled().keys()
    assert sum("engines" in result for result in compiled().values()) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), SAMPLE)
def test_a_compiled_class_gives_what_it_gave(name, backend):
    difference, engines = run(CASES[name], backend, engine_cache())
    assert difference <= CASES[name].tolerance
    assert engines == read(name)["backends"][backend]["engines"]


@pytest.mark.slow
def test_a_call_that_swaps_attention_processors_is_a_program():
    """Perturbed attention guidance gives the denoiser other processors for the length of its call."""
    assert measure_call("pixart_sigma_pag") == calls()["pixart_sigma_pag"]
