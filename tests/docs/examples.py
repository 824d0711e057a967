"""The fenced examples of the documents, and how each kind of them is run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

#: Examples that are not run, by how they begin, and why.
NOT_RUN = {
    "pip install ": "changes the environment that the tests run in",
    "hf auth login": "asks for a token",
    'diffkiln run bundle --prompt "a red fox" -o fox.png --processes': "needs a bundle for two; tests/parallel has it",
    "torchrun --nproc-per-node 2 draw.py": "starts two processes; tests/parallel does",
    "diffkiln sign bundle --sigstore": "needs a browser and the network",
    "from diffkiln.serving.ray import": "needs Ray; tests/serving runs it where `make test-more` has installed it",
    "pipe(prompt_embeds=embeds": "needs Stable Diffusion's weights; tests/end_to_end/test_inputs.py calls a small one",
    'built = diffkiln.compile_module(module, kwargs, target="nvidia': "tests/exporters builds engines of TensorRT",
}
#: Languages of blocks that show a listing or a message.
SHOWN = ("text",)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced example: its language, its text, and the line of the document that it begins in."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    """Returns the fenced examples of a document in their order."""
    text = document.read_text()
    found = _FENCE.finditer(text)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 2) for match in found]


def commands(block: Block) -> Iterator[str]:
    """Yields the commands of a shell example; a line that ends with a backslash goes on in the next."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def is_run(text: str) -> bool:
    """Returns True if the example is not among the exceptions."""
    return not text.lstrip().startswith(tuple(NOT_RUN))


def values(block: Block) -> list[Any]:
    """Returns what a JSON example shows: one value, a list of them, a value a line, or members of an object.

    Raises:
        ValueError: it is none of these.
    """
    text = block.text.strip()
    for wrapped in (text, f"[{text}]", f"{{{text}}}", "[" + text.replace("\n", ",") + "]"):
        with suppress(ValueError):
            value = json.loads(re.sub(r",(\s*,)+", ",", wrapped))
            return value if isinstance(value, list) else [value]
    raise ValueError(f"line {block.line} is not JSON")
