"""A plug-in is closed: outside its own files nothing imports its module, and nothing decides by its registered name.

Its own files are those that it is named after, wherever they lie: `exporters/onnx/check.py`, `runtime/engines/onnx.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffkiln
from diffkiln.plugins import plugins

ROOT = Path(diffkiln.__file__).parent
#: Kinds of plug-ins that are closed.
KINDS = ("exporters", "engines", "passes", "families")
#: (file, name): where the word means something else.
OTHER_MEANINGS = {
    ("runtime/diffusers/checks.py", "onnx"): "a part of the names of diffusers' own modules",
    ("__init__.py", "compile"): "the public function, and the module that has it",
    ("cli/build.py", "compile"): "the public function",
    ("cli/memory.py", "compile"): "the module of a public function",
    ("evaluate/trials.py", "compile"): "the public function",
    ("compiler/compile.py", "calibrate"): "the stage",
    ("compiler/compile.py", "recover"): "the stage",
    ("compiler/first_spec.py", "fuse_qkv"): "the first spec recommends it",
    ("compiler/first_spec.py", "compile"): "the first spec recommends it",
    ("bundle/card.py", "quantize"): "a word of the format: a card says that its model is a quantized one",
    ("cli/printing.py", "cache_schedule"): "a word of the format, for bundles of which no pass is installed",
    ("families/flux.py", "scheduler"): "a component of a pipeline",
    ("families/flux.py", "vae"): "a component of a pipeline",
    ("families/pixart.py", "scheduler"): "a component of a pipeline",
    ("families/pixart.py", "vae"): "a component of a pipeline",
    ("families/qwen_image/architecture.py", "scheduler"): "a component of a pipeline",
    ("families/qwen_image/architecture.py", "vae"): "a component of a pipeline",
    ("families/stable_diffusion.py", "scheduler"): "a component of a pipeline",
    ("families/stable_diffusion.py", "vae"): "a component of a pipeline",
    ("families/wan.py", "scheduler"): "a component of a pipeline",
    ("families/wan.py", "vae"): "a component of a pipeline",
    ("models/architectures.py", "scheduler"): "a component of a pipeline",
    ("passes/program/attention_backend.py", "vae"): "a component of a pipeline, in an example",
    ("interpreter/dtypes.py", "channels_last"): "torch's name of a memory format",
    ("record/pipeline.py", "guidance"): "the recorder's own module of that name",
}
#: Functions that are called as a pass is, and the package that the scheduler's outlining lies in.
_NAMESAKES = ("program.prune", "builder.prune", "layers.merging.merge_tokens", "outlining.scheduler")


def built_in(kind: str) -> set[str]:
    return {name for name, plugin in plugins(kind).items() if not plugin.distribution}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules of diffkiln that a statement names, and what it takes of them, with dots."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def decisive(node: ast.AST) -> Iterator[ast.expr]:
    """What a comparison, a case, a look-up or a table decides by."""
    if isinstance(node, ast.Compare):
        yield from (node.left, *node.comparators)
    elif isinstance(node, ast.MatchValue):
        yield node.value
    elif isinstance(node, ast.Dict) and not hasattr(node, "of_the_order"):
        yield from filter(None, node.keys)
    elif isinstance(node, ast.Subscript):
        yield node.slice
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("get", "pop", "startswith", "endswith"):
        yield from node.args[:1]


def words(node: ast.expr) -> Iterator[str]:
    """The texts of an expression: itself, or the items of a tuple, list or set."""
    items = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    yield from (item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str))


def leave_out_the_order(tree: ast.AST) -> None:
    """Marks the tables `before` and `after` of passes, which name others by design."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id in ("before", "after")
        ):
            node.value.of_the_order = True  # type: ignore[union-attr]


def offences(tree: ast.AST, names: set[str]) -> Iterator[tuple[str, str]]:
    """The plug-ins that a module knows, each with how."""
    leave_out_the_order(tree)
    for node in ast.walk(tree):
        for module in imported(node):
            parts, line = module.split("."), getattr(node, "lineno", 0)
            if parts[0] in ("diffkiln", "") and not any(namesake in module for namesake in _NAMESAKES):
                yield from ((name, f"line {line} imports {module}") for name in names & set(parts))
        for expression in decisive(node):
            yield from ((name, f"line {expression.lineno} decides by it") for name in names & set(words(expression)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_knows_a_plug_in(kind: str) -> None:
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT)
        others = built_in(kind) - {place.stem, *place.parts}
        tree = ast.parse(file.read_text())
        found += [
            f"{place}: {name}: {how}"
            for name, how in offences(tree, others)
            if (str(place), name) not in OTHER_MEANINGS
        ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from diffkiln.exporters.onnx.check import Onnx",
        "from diffkiln.exporters import onnx",
        "def late():\n    import diffkiln.exporters.onnx",
        "if name == 'onnx': pass",
        "if name in ('aot', 'onnx'): pass",
        "match name:\n    case 'onnx': pass",
        "TABLE = {'onnx': 1}",
        "TABLE['onnx']",
        "name.startswith('onnx')",
    ],
)
def test_knowing_a_plug_in_is_found(source: str) -> None:
    assert [name for name, _ in offences(ast.parse(source), {"onnx"})] == ["onnx"]


@pytest.mark.parametrize("source", ["import onnx", "DEFAULT = 'onnx'", "raise ValueError('choose onnx')"])
def test_a_word_is_no_knowledge(source: str) -> None:
    assert not list(offences(ast.parse(source), {"onnx"}))


@pytest.mark.parametrize(("place", "name"), OTHER_MEANINGS)
def test_every_other_meaning_is_still_there(place: str, name: str) -> None:
    assert name in {found for found, _ in offences(ast.parse((ROOT / place).read_text()), {name})}


def test_both_sides_of_a_backend_have_one_name() -> None:
    assert built_in("exporters") == built_in("engines")
