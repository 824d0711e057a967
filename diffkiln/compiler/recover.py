"""Trains the factors that bring a compressed denoiser back towards the original.

The original pipeline draws with all of its weights in memory; what its denoiser was given and what it answered is kept.
The denoiser as the passes leave it is then trained on that, its factors alone. A build that was killed goes on from the
state that it kept (diffkiln.compiler.training).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

from diffkiln.compiler.plan import Plan
from diffkiln.compiler.stages import Stages
from diffkiln.compiler.training import Pair, Training, TrainingFile
from diffkiln.errors import BuildError, SpecError
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.layers import Stored
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import load_module, pipeline_with
from diffkiln.passes import manager
from diffkiln.passes.base import Pass
from diffkiln.passes.layers import linear_layers
from diffkiln.passes.model.recover import LOSSES
from diffkiln.passes.registry import ListedPass
from diffkiln.record.call import Request
from diffkiln.record.keywords import NEGATIVES, parameters_of
from diffkiln.runtime.variants import as_texts

log = get_logger(__name__)

#: How many updates apart the state is written.
_EVERY = 50
#: Grows when the same options give other factors.
_VERSION = 1
#: How many answers at most the error before and after the training is measured on.
_SOME = 64
#: More directions than the rank that a decomposition looks at, and its rounds.
_SPARE, _ROUNDS = 8, 4


class Recovery(Protocol):
    """The options of the pass whose factors are trained; `texts` are its prompts."""

    component: str
    pictures: int
    batch: int
    seed: int
    rank: int
    updates: int
    learning_rate: float

    @property
    def texts(self) -> tuple[str, ...]: ...
    def trained(self, factors: Mapping[str, Pair]) -> Pass: ...


@dataclass(frozen=True)
class _Call:
    """One call of the original denoiser: its arguments, and the answer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    answer: torch.Tensor


def recover(plan: Plan, stages: Stages) -> Plan:
    """Returns the plan with the factors of its recovering passes trained.

    Raises:
        SpecError: the call takes no prompts.
        BuildError: the training gave numbers that are not finite.
    """
    for item in plan.listed:
        if any(fact.name == "recovered" for fact in item.step.provides()):
            recovery: Any = item.step
            with stages(f"recover {item.step.component}"), quiet_libraries(), manager.guarded(item):
                factors, note = _trained(plan, item)
            notes = next(ran.notes for ran in plan.report if ran.listed is item)
            plan = plan.replacing(item, recovery.trained(factors), *notes, note)
    return plan


def _trained(plan: Plan, item: ListedPass) -> tuple[Mapping[str, Pair], str]:
    recovery: Any = item.step
    file = TrainingFile(_key(plan, item))
    training = file.read()
    if training is None or training.done < recovery.updates:
        calls = _calls(plan, recovery)
        student, beginning = _student(plan, item)
        training = _train(student, calls, training or Training(beginning), recovery, file)
    factors = {name: (pair[0].detach(), pair[1].detach()) for name, pair in training.factors.items()}
    lost, left = training.errors[0], training.errors[-1]
    note = f"the denoiser's answers are {lost:.2%} off before the training, and {left:.2%} after it"
    return factors, note


# -- the original --


def _calls(plan: Plan, recovery: Recovery) -> list[_Call]:
    """Returns the calls of the original denoiser in all of its pictures."""
    source = plan.source.original  # what follows its pictures is nothing to its denoiser
    modules = {name: _original(plan, name) for name in source.modules}
    pipe: Any = pipeline_with(source, modules)
    if plan.state.scheduler is not None:
        pipe.register_modules(scheduler=plan.state.scheduler)
    pipe.set_progress_bar_config(disable=True)
    found: list[_Call] = []

    def keep(_module: Any, args: Any, kwargs: Any, result: Any) -> None:
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        found.append(_Call(copied[0], copied[1], _answer(result).clone()))

    handle = modules[recovery.component].register_forward_hook(keep, with_kwargs=True)
    try:
        for first in range(0, recovery.pictures, recovery.batch):
            numbers = range(first, min(first + recovery.batch, recovery.pictures))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(recovery.seed + first)
                pipe(**_keywords(pipe, plan.requests[0], recovery, numbers))
    finally:
        handle.remove()
    if not found:
        raise BuildError(f"recover: the original drew without calling {recovery.component}. Recover another component")
    return found


def _original(plan: Plan, name: str) -> torch.nn.Module:
    """Returns a component with its weights, as the passes leave it before the first that stores them in fewer bits."""
    module = load_module(plan.source, name, plan.dtype)
    for item in plan.listed:
        if item.step.component == name and any(fact.name in LOSSES for fact in item.step.provides()):
            break
        manager.apply(module, name, [item])
    return module


def _keywords(pipe: Any, request: Request, recovery: Recovery, numbers: Sequence[int]) -> dict[str, Any]:
    """Returns the keywords of a call that draws the pictures of these numbers."""
    parameters = parameters_of(pipe)
    if "prompt" not in parameters:
        raise SpecError(f"recover draws from prompts, and the call of {type(pipe).__name__} takes none. Remove it")
    texts = [recovery.texts[number % len(recovery.texts)] for number in numbers]
    given = {key: value for key, value in request.fixed.items() if key != "batch_size"}
    given |= {key: [as_texts(given[key])[0]] * len(texts) for key in NEGATIVES if key in given}
    given |= {"prompt": texts}
    if request.needs_negative:
        given["negative_prompt"] = [""] * len(texts)
    if "generator" in parameters:
        given["generator"] = [torch.Generator().manual_seed(recovery.seed + number) for number in numbers]
    if "output_type" in parameters:
        given["output_type"] = "latent"
    return given


def _answer(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


# -- the compressed one --


def _student(plan: Plan, item: ListedPass) -> tuple[torch.nn.Module, Mapping[str, Pair]]:
    """Returns the denoiser as the passes up to this one leave it, and the factors that it begins with."""
    component = item.step.component
    module = load_module(plan.source, component, plan.dtype)
    plain: dict[str, torch.Tensor] = {}
    for other in plan.listed:
        plain |= {name: layer.weight.detach() for name, layer in linear_layers(module).items()}
        manager.apply(module, component, [other])
        if other is item:
            break
    module.requires_grad_(False)
    recovery: Any = item.step
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recovery.seed)
        pairs = {name: _approximation(plain[name] - layer.weight, recovery.rank) for name, layer in _layers(module)}
    return module, pairs


def _layers(module: torch.nn.Module) -> Iterator[tuple[str, Stored]]:
    """Yields the layers with factors, by name."""
    for name, part in module.named_modules():
        if isinstance(part, Stored) and "weight_down" in part._buffers:
            yield name, part


def _approximation(lost: torch.Tensor, rank: int) -> Pair:
    """Returns the factors whose product is nearest to what a weight lost."""
    u, s, v = torch.svd_lowrank(lost.float(), min(rank + _SPARE, *lost.shape), _ROUNDS)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous()


# -- the training --


def _train(
    student: torch.nn.Module, calls: Sequence[_Call], training: Training, recovery: Recovery, file: TrainingFile
) -> Training:
    """Returns the training with all of its updates done; it is written to the file on the way."""
    for name, layer in _layers(student):
        layer._buffers["weight_down"], layer._buffers["weight_up"] = training.factors[name]
    if not training.errors:
        training.errors.append(_error(student, calls))
    optimizer = _optimizer(training, recovery)
    while training.done < recovery.updates:
        optimizer.param_groups[0]["lr"] = _rate(training.done, recovery)
        call = calls[_turn(training.done, len(calls), recovery.seed)]
        _update(optimizer, training, student, call)
        if training.done == recovery.updates:
            training.errors.append(_error(student, calls))
        if training.done % _EVERY == 0 or training.done == recovery.updates:
            log.info("recover %s: %d of %d updates", recovery.component, training.done, recovery.updates)
            file.write(training)
    return training


def _update(optimizer: torch.optim.Adam, training: Training, student: torch.nn.Module, call: _Call) -> None:
    """Does one update of the factors.

    Raises:
        BuildError: the numbers are not finite.
    """
    with torch.enable_grad():
        loss = _loss(student, call)
        gradients = torch.autograd.grad(loss, training.leaves, materialize_grads=True)
    if not loss.isfinite():
        raise BuildError(
            f"recover: the training gave numbers that are not finite after {training.done} updates. Give a smaller "
            "learning_rate"
        )
    for leaf, gradient in zip(training.leaves, gradients, strict=True):
        leaf.grad = gradient
    optimizer.step()
    training.done += 1


def _optimizer(training: Training, recovery: Recovery) -> torch.optim.Adam:
    """Returns Adam as it was after the updates that are done."""
    leaves = [leaf.requires_grad_() for leaf in training.leaves]
    optimizer = torch.optim.Adam(leaves, recovery.learning_rate, foreach=False)
    for leaf, (first, second) in zip(leaves, training.moments, strict=True):
        step = torch.tensor(float(training.done))
        optimizer.state[leaf] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return optimizer


def _turn(done: int, count: int, seed: int) -> int:
    """Returns the number of the call that the next update looks at: all of them in turn, shuffled each time."""
    generator = torch.Generator().manual_seed(seed + done // count)
    return int(torch.randperm(count, generator=generator)[done % count])


def _rate(done: int, recovery: Recovery) -> float:
    return recovery.learning_rate * 0.5 * (1 + math.cos(math.pi * done / recovery.updates))


def _loss(student: torch.nn.Module, call: _Call) -> torch.Tensor:
    """Returns the square of the error of one answer, relative to the answer."""
    answer = call.answer.float()
    found = _answer(student(*call.args, **call.kwargs)).float()
    return (found - answer).square().mean() / answer.square().mean().clamp_min(1e-12)


def _error(student: torch.nn.Module, calls: Sequence[_Call]) -> float:
    """Returns the relative error of some answers, which are spread over all."""
    some = calls[:: -(-len(calls) // _SOME)]
    with torch.no_grad():
        return math.sqrt(sum(float(_loss(student, call)) for call in some) / len(some))


# -- the state in the cache --


def _key(plan: Plan, item: ListedPass) -> str:
    """Returns a name for everything that decides the factors."""
    import diffusers

    listed = plan.listed[: next(at for at, other in enumerate(plan.listed) if other is item) + 1]
    scheduler = plan.state.scheduler
    decisive = {
        "version": _VERSION,
        "source": plan.source.pinned(),
        "dtype": plan.dtype,
        "passes": [[each.step.name, each.step.version, each.step.options()] for each in listed],
        "timesteps": [type(scheduler).__name__, json.loads(scheduler.to_json_string())] if scheduler else [],
        "call": {key: repr(value) for key, value in plan.requests[0].fixed.items()},
        "tools": [torch.__version__, diffusers.__version__],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


__all__ = ["recover"]
