"""One of several processes: loads a bundle, draws, and writes what it has drawn.

    python -m tests.parallel.worker BUNDLE OUTPUT KEYWORDS

KEYWORDS is JSON. OUTPUT.<rank>.pt gets the picture, the bytes that the process has sent in each step, and the names of
the components whose weights it holds, with the bytes of these. With "as_diffusers": true it gets the picture alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import diffkiln


def main(bundle: str, output: str, text: str) -> None:
    keywords = json.loads(text)
    if keywords.pop("as_diffusers", False):
        as_diffusers(bundle, output, keywords)
        return
    pipe = diffkiln.load(bundle)
    sent: list[int] = []

    def step_end(*_: Any) -> dict[str, Any]:
        sent.append(pipe.executor.group.sent - sum(sent))
        return {}

    generator = torch.Generator().manual_seed(5)
    shown = {} if keywords.pop("unshown", False) else {"callback_on_step_end": step_end}
    result = pipe(**keywords, generator=generator, output_type="pt", **shown)
    picture = next(iter(result.values()))
    held = sorted({component for component, _ in pipe.executor.store.groups})
    nbytes = sum(group.nbytes for group in pipe.executor.store.groups.values())
    found = {"picture": picture, "sent": sent, "all": pipe.executor.group.sent, "held": held, "nbytes": nbytes}
    torch.save(found, f"{output}.{pipe.rank}.pt")
    pipe.close()


def as_diffusers(bundle: str, output: str, keywords: dict[str, Any]) -> None:
    pipe = diffkiln.load(bundle, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(**keywords, generator=torch.Generator().manual_seed(5), output_type="pt")
    torch.save({"picture": next(iter(result.values()))}, f"{output}.{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
