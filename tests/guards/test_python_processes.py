"""Processes that diffkiln starts import nothing from the current directory, which may be a stranger's bundle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import diffkiln

ROOT = Path(diffkiln.__file__).parent


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each list that begins with `sys.executable`: its place, and the literals that follow."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield place, [item.value for item in node.elts if isinstance(item, ast.Constant)]


def test_each_is_started_with_a_safe_path():
    found = dict(commands())
    assert found
    assert {place for place, literals in found.items() if literals[0] != "-P"} == set()
