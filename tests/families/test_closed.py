"""Families are closed: nothing outside diffkiln/families imports one, or names what is one's own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import diffkiln
from diffkiln.models.architectures import architectures
from diffkiln.plugins import plugins
from diffkiln.record.patches import known_patches

ROOT = Path(diffkiln.__file__).parent
OUTSIDE = sorted(path for path in ROOT.rglob("*.py") if "families" not in path.relative_to(ROOT).parts)


def own_names() -> set[str]:
    """The families' names, those of their architectures and pipelines, and the classes that their patches know."""
    families = plugins("families")
    pipelines = {place.partition(":")[2] for family in families.values() for place in family.load().pipelines}
    known = {name for patch in known_patches() for name in patch.known_in.split()}
    return {*families, *architectures(), *pipelines, *known, *(one.pipeline for one in architectures().values())}


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {id(first.value) for first in firsts if isinstance(first, ast.Expr)}


def words_of(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, and every name and string but docstrings."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names) | ast.ImportFrom(names=names):
                module = getattr(node, "module", None)
                for alias in names:
                    yield f"{module}.{alias.name}" if module else alias.name
                    yield alias.name
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=str(word)) | ast.arg(arg=word):
                yield word
            case ast.Constant(value=str(word)) if id(node) not in prose:
                yield word


def breaches(source: str) -> list[str]:
    """The words of a module that only a family may have."""
    own = own_names()
    return [word for word in words_of(ast.parse(source)) if word in own or word.startswith("diffkiln.families")]


def test_nothing_outside_imports_or_names_a_family():
    found = {path.relative_to(ROOT).as_posix(): breaches(path.read_text()) for path in OUTSIDE}
    assert {path: words for path, words in found.items() if words} == {}


def test_a_breach_is_found():
    for line in (
        "from diffkiln.families import wan",
        "import diffkiln.families.wan as family",
        'family == "longcat_image"',
        'source = {"architecture": "sd-1.5"}',
        "isinstance(pipe, diffusers.WanPipeline)",
        "from diffusers import WanPipeline",
    ):
        assert breaches(line), line
    assert not breaches('"""A module for flux."""\nfolder = f"{name} such as flux.1-dev"')


def test_families_know_each_other_no_better():
    """Each is a file or a folder of its own."""
    for name, family in plugins("families").items():
        place = ROOT / "families" / name
        for path in [place.with_suffix(".py")] if place.with_suffix(".py").exists() else place.glob("*.py"):
            imported = [word for word in words_of(ast.parse(path.read_text())) if word.startswith("diffkiln.families.")]
            others = [word for word in imported if word.split(".")[2] not in (name, "Family")]
            assert others == [], family
