"""One word, one meaning: names that were retired do not come back."""

import io
import re
import tokenize
from pathlib import Path

import diffkiln

ROOT = Path(diffkiln.__file__).parent
#: Retired word → the one that stands in its place (docs/glossary.md).
RETIRED = {
    "ghost": "meta model", "ghosts": "meta models", "haunt": "make fake", "likeness": "structural key",
    "portion": "shard", "portions": "shards", "twin": "reduced model", "twins": "reduced models",
    "lane": "call site", "lanes": "call sites", "weave": "apply a schedule", "weaving": "applying",
    "woven": "scheduled",
    "shim": "engine block", "shims": "engine blocks", "mend": "hint", "openat": "safe open", "placed": "listed",
    "place": "device, folder, path, position or capacity", "places": "devices, folders, paths or positions",
    "told": "what it is: a reason, a notice, facts",
    "joining": "merging", "parting": "splitting", "halves": "half batches",
}  # fmt: skip
#: The old name of a public attribute keeps working; what torch calls a write in place is called so.
KEPT = {("errors.py", "mend"), ("tape.py", "_write_in_place")}


def words(identifier: str) -> set[str]:
    return {word.casefold() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def identifiers(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {path.stem, *(token.string for token in tokens if token.type == tokenize.NAME)}


def test_retired_names_are_not_used():
    used = [(path, name) for path in ROOT.rglob("*.py") for name in identifiers(path) if (path.name, name) not in KEPT]
    found = [(path, name, word) for path, name in used for word in words(name) & RETIRED.keys()]
    told = [f"{path.relative_to(ROOT)}: {name}: say {RETIRED[word]}" for path, name, word in sorted(found)]
    assert not told, "\n".join(told)


def test_the_glossary_names_every_retired_word():
    text = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text()
    for word in RETIRED:
        assert re.search(rf"\b{word.rstrip('s')}", text) or word in ("weaving", "woven"), word
