"""Guidance by a denoiser that is called twice, or with a doubled batch: which branch reads the prompt (`prompts`),
values of half the batch (`half_batches`), the calls that take each other's place (`merging`, `splitting`), and branches
on processes of their own (`spreading`). They are rewrites of programs and know nothing of models, but for the question
of whether there is a second evaluation (`evaluations`)."""

from diffkiln.passes.guiding.evaluations import are_pairs, no_second_evaluation, rebatched
from diffkiln.passes.guiding.half_batches import HalfBatches
from diffkiln.passes.guiding.merging import join
from diffkiln.passes.guiding.prompts import prompt_branch
from diffkiln.passes.guiding.splitting import part
from diffkiln.passes.guiding.spreading import spread

__all__ = [
    "HalfBatches",
    "are_pairs",
    "join",
    "no_second_evaluation",
    "part",
    "prompt_branch",
    "rebatched",
    "spread",
]
