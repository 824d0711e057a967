"""Lists the pictures to draw: every prompt with several seeds."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of a file of prompts, which may be those of a whole benchmark.
MOST = 16 * 2**20


@dataclass(frozen=True)
class Request:
    """One picture to draw: its prompt, and the seed of its noise."""

    prompt: str
    seed: int


def requests_of(prompts: list[str], seeds: int) -> list[Request]:
    """Returns each prompt with each seed from 0, prompt by prompt."""
    return [Request(prompt, seed) for prompt in prompts for seed in range(seeds)]
