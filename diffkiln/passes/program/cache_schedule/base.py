"""What every method of a caching schedule is: a place in the denoising run, and perhaps a hook of diffusers."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from diffkiln.errors import Incompatible, Problem
from diffkiln.passes.base import Fact, Pass, ProgramPass, State
from diffkiln.passes.variants import Variant, constant
from diffkiln.spec import Target

METHOD = "Which results are kept, and how later steps use them."
DYNAMIC = "Let diffusers' hooks decide at each step; only with as_diffusers."


class CacheSchedule(Variant, ProgramPass):
    """Let denoising steps reuse values that earlier steps kept. The compiler decides which steps do.

    With `dynamic`, diffusers' own hooks decide at each step. The bundle then runs only as diffusers, and a request's
    cost is not known in advance.
    """

    name: ClassVar[str] = "cache_schedule"
    summary: ClassVar[str] = "let some steps reuse results of earlier steps"
    discriminators: ClassVar = ("method", "dynamic")
    after: ClassVar = {"attention_backend": "a schedule is made of programs that have their kernels"}
    takes: ClassVar = frozenset({"calibrated"})
    examples: ClassVar = (
        {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2},
        {"name": "cache_schedule", "component": "transformer", "method": "taylorseer", "interval": 3, "order": 2},
        {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 1, 0, 1, 0, 1, 0, 1]},
        {"name": "cache_schedule", "component": "unet", "method": "deepcache", "interval": 3, "depth": 2},
    )
    #: Whether diffusers' hook must be told which call of a step it is in.
    hook_needs_context: ClassVar[bool] = True

    @classmethod
    def called(cls) -> str:
        return "dynamic " * constant(cls, "dynamic") + constant(cls, "method")

    @classmethod
    def misfit(cls, field: str, options: Mapping[str, Any], left: Sequence[type[Pass]], where: str) -> Problem:
        dynamic, method = options.get("dynamic", False), options.get("method")
        if field != "dynamic" or not isinstance(dynamic, bool):
            return super().misfit(field, options, left, where)
        if dynamic:
            return Problem(f"{where}.dynamic", f"diffusers has no hook that decides {method} at each step", "Remove it")
        return Problem(f"{where}.method", f"{method} decides at each step, in diffusers only", 'Add "dynamic": true')

    def provides(self) -> Iterable[Fact]:
        yield Fact("scheduled", self.component, self.name)

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if self.component not in state.denoisers:
            yield Problem(where, f"{self.component} is not a part of the denoising run", "Choose the denoiser.")
        else:
            yield from self.check_model(module, state, where)
        yield from self.check_steps(state, Fact("calibrated", self.component) in state.facts, where)

    @abstractmethod
    def check_model(self, module: torch.nn.Module, state: State, where: str) -> Iterable[Problem]:
        """Returns what the denoiser or its pipeline lacks for the method."""

    def check_steps(self, state: State, calibrates: bool, where: str) -> Iterable[Problem]:
        """Yields what is wrong with the steps that compute; `calibrates` says that a calibrate stands before it."""
        if calibrates:
            reason = "calibrate chooses steps, and this has none to choose"
            yield Problem(f"{where}.method", reason, "Remove calibrate.")

    # -- as diffusers' own pipeline --

    def hook(self, pipe: Any) -> Any:
        """Returns diffusers' configuration of an equivalent hook, or None."""
        return None

    @classmethod
    def restore_run(cls, pipe: Any, options: Mapping[str, Any]) -> None:
        cls.model_construct(**options).enable(pipe)

    def enable(self, pipe: Any) -> None:
        """Has diffusers' own hook do what the schedule does.

        Raises:
            Incompatible: diffusers has none that does, or not for this model.
        """
        method = constant(type(self), "method")
        config = self.hook(pipe)
        if config is None:
            raise Incompatible(
                f"diffusers has no hook that does what this schedule of {self.component} does ({method}). Load the "
                "bundle without as_diffusers"
            )
        if self.hook_needs_context and "cache_context(" not in inspect.getsource(type(pipe)):
            raise Incompatible(
                f"{type(pipe).__name__} does not tell diffusers' hooks which of its calls is which, which {method} "
                "needs. Load the bundle without as_diffusers"
            )
        try:
            pipe.components[self.component].enable_cache(config)
        except Exception as error:  # whatever diffusers raises for a model that its hooks do not know
            kind = type(pipe.components[self.component]).__name__
            raise Incompatible(f"diffusers' hook for {method} does not fit {kind}: {error}") from error


def hooks() -> Any:
    """Returns diffusers' module of hooks, imported when needed."""
    from diffusers import hooks as library

    return library
