"""The beginning of a pipeline's own call, up to its first piece of work: where diffusers refuses what it is given.

Pipelines look at their inputs first. What one refuses then is refused as diffusers, too, and is known in an instant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from diffkiln.errors import DiffkilnError, Problem, SpecError
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import TensorType
from diffkiln.record.call import Request, call_keywords, component_methods, modules_with
from diffkiln.record.keywords import NEGATIVES, Tensors, parameters_of
from diffkiln.record.patches import fixed_lengths
from diffkiln.record.refusals import refusal


class _Enough(BaseException):
    """The call has looked at its inputs, and begins to work."""


def rehearse(pipe: Any, requests: Sequence[Request], where: Sequence[str]) -> None:
    """Begins the call of every variant.

    Args:
        pipe: the meta model.
        requests: the variants.
        where: the JSON path of each one's inputs.

    Raises:
        SpecError: the pipeline refuses the inputs of one, with its own reason.
    """
    problems: dict[str, Problem] = {}
    for request, path in zip(requests, where, strict=True):
        if reason := _refused(pipe, request):
            hint = "diffusers refuses this call, too. Change the inputs."
            problems.setdefault(path, Problem(path, f"{type(pipe).__name__} says: {reason}", hint))
    if problems:
        raise SpecError(problems=list(problems.values()))


def _refused(pipe: Any, request: Request) -> str:
    """Returns the pipeline's reason if it refuses the call without a negative prompt and with one."""
    reason = _begun(pipe, request, negative=False)
    able = "negative_prompt" in parameters_of(pipe) and not request.withheld.intersection(NEGATIVES)
    reason = reason and (_begun(pipe, request, negative=True) if able else reason) and reason
    if not reason:
        return ""
    with fixed_lengths(pipe):  # some read the prompt, and refuse that of a recording
        return _begun(pipe, request, negative=False) and reason


def _begun(pipe: Any, request: Request, negative: bool) -> str:
    keywords = call_keywords(pipe, request, negative)
    texts = [keywords[name] for name in request.prompts(parameters_of(pipe), negative)]
    sentinels = [text for given in texts for text in ([given] if isinstance(given, str) else given)]
    keywords |= {keyword: _empty(types) for keyword, types in request.tensors.items()}
    try:
        with torch.inference_mode(), quiet_libraries(), _stopping(pipe):
            pipe(**keywords)
    except (_Enough, DiffkilnError):
        return ""
    except Exception as error:  # whatever the pipeline's own code raises
        return refusal(error, sentinels)
    return ""


def _empty(types: Tensors) -> Any:
    """Returns tensors of these types without data; a list of them for a list."""
    if isinstance(types, TensorType):
        return torch.empty(types.shape, dtype=dtype_of(types.dtype), device="meta")
    return [_empty(each) for each in types]


@contextlib.contextmanager
def _stopping(pipe: Any) -> Iterator[None]:
    """Ends the call where its work begins: at components, tokenizers, image processors and noise."""
    from diffusers.image_processor import VaeImageProcessor
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    def stop(*_args: Any, **_kwargs: Any) -> Any:
        raise _Enough

    with contextlib.ExitStack() as stack:
        for kind, method in (
            (VaeImageProcessor, "preprocess"),
            (BaseImageProcessor, "__call__"),
            (PreTrainedTokenizerBase, "__call__"),
        ):
            stack.enter_context(mock.patch.object(kind, method, stop))
        for module in modules_with("randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", stop))
        for _, module, method in component_methods(pipe):
            module.__dict__[method] = stop
            stack.callback(module.__dict__.pop, method)
        here = property(lambda _: torch.device("cpu"))
        stack.enter_context(mock.patch.object(type(pipe), "_execution_device", here, create=True))
        yield
