"""The page says what was measured, of every class there is; and a few classes are measured in every run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import diffusers
import pytest

from tests.coverage import CASES, GROUPS
from tests.coverage.calls import CALLS
from tests.coverage.calls.classes import NOT_BUILT, exported
from tests.coverage.calls.compiled import COMPILED
from tests.coverage.calls.measure import measure_call
from tests.coverage.measure import RESULTS, read, run
from tests.coverage.table import DOCUMENT, calls, compiled, counts, document
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

TESTS = Path(__file__).parents[1]
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


def built() -> set[str]:
    """Names of classes that the modules of builders have, which is quicker than building all."""
    texts = [path.read_text() for path in (TESTS / "coverage" / "calls").glob("*.py") if path.name != "classes.py"]
    texts += [path.read_text() for path in (TESTS / "pipelines").glob("*.py")]
    return set(re.findall(r"\b\w*Pipeline\w*", "".join(texts)))


def test_every_pipeline_that_diffusers_exports_has_an_entry():
    """A class of a new diffusers has none, until it has a builder in tests/coverage/calls or a reason in NOT_BUILT."""
    missing = " ".join(sorted(exported() - built() - NOT_BUILT.keys()))
    assert not missing, f"build {missing} in tests/coverage/calls, or say in classes.py why not"
    assert NOT_BUILT.keys() <= exported()
    assert not NOT_BUILT.keys() & {result["class"] for result in calls().values()}


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


def test_the_readme_counts_as_the_page_does():
    found = counts()
    measured = sum(found[kind] for kind in ("a program", "diffusers", "refused"))
    text = " ".join((DOCUMENT.parents[1] / "README.md").read_text().split())
    assert f"{found['a program']} of the {measured} classes" in text
    assert f"exports {sum(found.values())}" in text


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


@pytest.mark.more
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning", "ignore:Default grid_sample:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sd_boxes", id="that switches parts of the denoiser off"),
        pytest.param("animate_sparse", id="that checks the range of frames"),
        pytest.param("sd_zero_video", id="whose safety checker looks at arrays"),
        pytest.param("bria_fibo_edit", id="that takes a prompt of one form alone"),
    ],
)
def test_a_call_is_a_program(name):
    assert measure_call(name) == calls()[name]
