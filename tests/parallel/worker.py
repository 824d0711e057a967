"""One of several processes: loads a bundle, draws, and writes what it has drawn.

    python -m tests.parallel.worker BUNDLE OUTPUT KEYWORDS

KEYWORDS is JSON. OUTPUT.<rank>.pt gets the picture, and the bytes that the process has sent in each step.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import diffkiln


def main(bundle: str, output: str, text: str) -> None:
    keywords = json.loads(text)
    pipe = diffkiln.load(bundle)
    sent: list[int] = []

    def step_end(*_: Any) -> dict[str, Any]:
        sent.append(pipe.executor.group.sent - sum(sent))
        return {}

    generator = torch.Generator().manual_seed(5)
    shown = {} if keywords.pop("unshown", False) else {"callback_on_step_end": step_end}
    result = pipe(**keywords, generator=generator, output_type="pt", **shown)
    picture = next(iter(result.values()))
    torch.save({"picture": picture, "sent": sent, "all": pipe.executor.group.sent}, f"{output}.{pipe.rank}.pt")
    pipe.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
