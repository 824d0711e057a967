"""Brings documents from outside of docs/ into the site, and turns links between documents into links of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: A document's place in the repository → its place in the site.
PLACES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "examples/specs/README.md": "specs.md",
    "examples/digits/README.md": "digits.md",
    "examples/digits_unet/README.md": "digits-unet.md",
    "examples/serving/README.md": "serve-demo.md",
    **{f"examples/specs/{path.name}": f"specs/{path.name}" for path in ROOT.glob("examples/specs/*.json")},
    **{f"benchmarks/results/{path.name}": f"results/{path.name}" for path in ROOT.glob("benchmarks/results/*.md")},
}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents that lie outside of docs/."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites relative links from places in the repository to places in the site."""
    site = page.file.src_uri
    source = next((name for name, place in PLACES.items() if place == site), f"docs/{site}")
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _rewritten(part, source, site) for part in parts)


def _rewritten(text: str, source: str, site: str) -> str:
    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        if target.startswith("diffkiln/") and (ROOT / target).exists():  # code, which the site does not hold
            return found[1]
        place = PLACES.get(target, target.removeprefix("docs/"))
        return f"[{found[1]}]({posixpath.relpath(place, posixpath.dirname(site) or '.')}{found[3] or ''})"

    return _LINK.sub(link, text)
