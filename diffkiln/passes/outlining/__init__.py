"""Pieces of recorded programs as regions, so that a backend can lower them: whole components, what lies between a
component's blocks, and the arithmetic between the calls of a denoiser."""

from diffkiln.passes.outlining.scheduler import SCHEDULER, between_calls
from diffkiln.passes.outlining.segments import between_blocks
from diffkiln.passes.outlining.whole import whole

__all__ = ["SCHEDULER", "between_blocks", "between_calls", "whole"]
