"""The shape of the house: no circles, few loose modules, short functions."""

from __future__ import annotations

import ast
import statistics
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

import diffkiln

ROOT = Path(diffkiln.__file__).parent
#: What belongs to no room: the public names, and what every room needs.
LOOSE = {"__init__", "__main__", "errors", "plugins", "version"}


def test_no_modules_import_each_other_in_a_circle():
    """Every import counts: those inside of functions, and those for type checkers."""
    graph = grimp.build_graph("diffkiln", exclude_type_checking_imports=False, cache_dir=None)
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_modules_lie_in_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == LOOSE


def test_functions_are_short():
    trees = (ast.parse(path.read_text()) for path in ROOT.rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    assert statistics.median(lines) <= 8
    assert statistics.quantiles(lines, n=10)[-1] <= 22
