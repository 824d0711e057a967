"""Guidance by a denoiser that is called twice, or with a doubled batch: which branch reads the prompt (`prompts`),
values of half the batch (`half_batches`), and the calls that take each other's place (`merging`, `splitting`). They are
rewrites of programs and know nothing of models."""

from diffkiln.passes.guiding.half_batches import HalfBatches
from diffkiln.passes.guiding.merging import join
from diffkiln.passes.guiding.prompts import prompt_branch
from diffkiln.passes.guiding.splitting import part

__all__ = ["HalfBatches", "join", "part", "prompt_branch"]
