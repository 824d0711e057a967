"""Guidance by a denoiser that is called twice, or with a doubled batch: which lane reads the prompt (`prompts`), values
of half the batch (`halves`), and the calls that take each other's place (`joining`, `parting`). They are rewrites of
programs and know nothing of models."""

from diffkiln.passes.guiding.halves import Halves
from diffkiln.passes.guiding.joining import join
from diffkiln.passes.guiding.parting import part
from diffkiln.passes.guiding.prompts import prompt_lane

__all__ = ["Halves", "join", "part", "prompt_lane"]
