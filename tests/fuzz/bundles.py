"""A whole bundle as an input: bytes say which of its JSON files is changed and how; its digests are made to fit."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffkiln
from diffkiln import cli
from diffkiln.errors import DiffkilnError, InternalFault
from diffkiln.guards.printable import printable
from tests.fuzz import mutate

FROZEN = Path(__file__).parents[1] / "frozen" / "0.1.0" / "data" / "bundle"
#: What is changed; other files are those of `as_diffusers`.
JSON_FILES = ("manifest.json", "programs/", "text/")


@cache
def _room() -> tuple[Path, tuple[str, ...]]:
    room = Path(tempfile.mkdtemp(prefix="diffkiln-fuzz-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    files = sorted(path.relative_to(FROZEN).as_posix() for path in FROZEN.rglob("*.json"))
    return room, tuple(name for name in files if name.startswith(JSON_FILES))


def run(data: bytes) -> None:
    """Loads and calls a changed bundle. What is refused is refused by our own errors, and none is an internal fault."""
    room, names = _room()
    which, seed = (data[0] if data else 0) % len(names), int.from_bytes(data[1:9], "little")
    damaged = room / "damaged"
    shutil.copytree(FROZEN, damaged)
    try:
        change(damaged, names[which], lambda content: mutate.json_text(content, seed))
        use(damaged)
    finally:
        shutil.rmtree(damaged)


def use(path: Path) -> None:
    """Does with a bundle what a user does with a stranger's: looks at it, loads it, draws with it."""
    _inspect(path)
    try:
        _draw(path)
    except InternalFault as error:
        raise error.__cause__ or error from error
    except DiffkilnError as error:
        str(error).encode()


def _inspect(path: Path) -> None:
    """All that `diffkiln inspect` shows, whatever is wrong: an internal fault would have the exit code 70."""
    programs = [["--program", entry.stem] for entry in (path / "programs").glob("*.json")]
    for options in ([], ["--json"], ["--bom"], *programs):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main(["inspect", str(path), *options])
        assert code in (0, 2, 3, 4, 5, 6), err.getvalue()
        for text in (out.getvalue(), err.getvalue()):
            assert text == printable(text, lines=True)


def _draw(path: Path) -> None:
    with diffkiln.load(path) as pipe:
        pipe("a black cat", output_type="np")


def change(bundle: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    """Edits one file of a bundle and makes the manifest and its digest fit."""
    content = edit((bundle / name).read_bytes())
    (bundle / name).write_bytes(content)
    manifest = bundle / "manifest.json"
    if name != manifest.name:
        table: Any = json.loads(manifest.read_bytes())
        for row in table["files"]:
            if row["path"] == name:
                row |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(table))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (bundle / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
