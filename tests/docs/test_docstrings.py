"""Docstrings say what a function does: a verb in the third person first, a class by a noun, and short sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import diffkiln

ROOT = Path(diffkiln.__file__).parent
#: Plurals, which end as verbs in the third person do.
NOUNS = {"Arguments", "Bytes", "Files", "Images", "Its", "Keywords", "Numbers", "Tensors", "This", "Those", "Weights"}
#: Words that stand in the place of a noun.
PLACEHOLDERS = {"How", "That", "Those", "What", "When", "Where", "Whether", "Which", "While", "Why"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _definitions() -> Iterator[tuple[str, Function | ast.ClassDef, str]]:
    """Yields each definition that has a docstring: where it stands, its syntax tree, and the docstring."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node, text


def _is_command(node: Function) -> bool:
    """Returns True for click's callbacks, whose docstrings are the help: they are written as orders."""
    return any(re.search(r"\b(command|group)\b", ast.unparse(decorator)) for decorator in node.decorator_list)


def _first_word(text: str) -> str:
    return text.split()[0].rstrip(".,:;")


def _opens_with_a_verb(text: str) -> bool:
    word = _first_word(text)
    return re.fullmatch(r"[A-Z][a-z]+s", word) is not None and word not in NOUNS


def test_functions_open_with_a_verb_in_the_third_person():
    found = [
        (where, text) for where, node, text in _definitions() if isinstance(node, Function) and not _is_command(node)
    ]
    others = [f"{where}: {text.partition(chr(10))[0]}" for where, text in found if not _opens_with_a_verb(text)]
    assert len(found) > 1000
    assert len(others) <= 0.05 * len(found), "\n".join(others)


def test_classes_do_not_open_with_a_placeholder_for_a_noun():
    found = [(where, text) for where, node, text in _definitions() if isinstance(node, ast.ClassDef)]
    others = [f"{where}: {text.partition(chr(10))[0]}" for where, text in found if _first_word(text) in PLACEHOLDERS]
    assert len(others) <= 0.05 * len(found), "\n".join(others)


def test_sentences_are_short():
    """The first paragraph counts: what follows may list arguments and sources."""
    paragraphs = [" ".join(text.partition("\n\n")[0].split()) for _, _, text in _definitions()]
    sentences = [sentence for text in paragraphs for sentence in re.split(r"[.:;] ", text)]
    long = [sentence for sentence in sentences if len(sentence.split()) > 25]
    assert len(long) <= 0.01 * len(sentences), "\n".join(long)
