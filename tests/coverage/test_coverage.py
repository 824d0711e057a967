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


def test_nearly_every_transformer_is_compiled():
    assert counted("transformer", "aot_inductor") >= 42


def test_every_unet_is_compiled():
    assert counted("unet", "aot_inductor") == sum(case.group == "unet" for case in CASES.values())


def test_thirty_classes_are_onnx_models():
    assert sum(counted(group, "onnx") for group in GROUPS) >= 30


def test_most_transformers_are_engines_of_tensorrt():
    assert counted("transformer", "tensorrt") >= 25


def test_most_calls_are_programs():
    assert sum("diffusers" not in result for result in calls().values()) >= 30


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
