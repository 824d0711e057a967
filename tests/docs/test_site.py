"""The site is built without a warning, has every public name, and asks no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffkiln
from website import pictures

ROOT = Path(__file__).parents[2]
#: What a page loads by itself; a link that a reader follows is another matter.
_LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)|<link\b[^>]*\bhref=\"([^\"]+)")
_IN_STYLES = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(made)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return made


def test_every_page_is_there(site: Path):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    documents = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert documents | {"index.html", "security.html", "specs.html", "results/cold_start.html"} <= pages


def test_no_page_asks_another_server(site: Path):
    for path in site.rglob("*.html"):
        loaded = [next(filter(None, found)) for found in _LOADED.findall(path.read_text())]
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], path
    for path in site.rglob("*.css"):
        assert not _IN_STYLES.search(path.read_text()), path


def test_the_reference_has_every_public_name(site: Path):
    text = (site / "api.html").read_text()
    anchors = set(re.findall(r'id="(diffkiln\.[\w.]+)"', text))
    names = {anchor.rpartition(".")[2] for anchor in anchors}
    assert set(diffkiln.__all__) - {"__version__", "Spec", "errors"} <= names
    assert "diffkiln.runtime.pipeline.CompiledPipeline.__call__" in anchors


def test_the_pictures_are_as_they_are_drawn(tmp_path: Path, monkeypatch):
    kept = pictures.IMAGES
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    for draw in (pictures.straight_line, pictures.regions, pictures.offloading, pictures.schedule):
        draw()
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in kept.glob("*.svg"))
    for name in drawn:
        assert (tmp_path / name).read_text() == (kept / name).read_text()
