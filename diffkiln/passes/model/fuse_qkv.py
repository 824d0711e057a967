"""Fuse the query, key and value projections of attention into one matrix, and delete the originals."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import FUSED
from diffkiln.passes.base import Fact, ModelPass, State
from diffkiln.spec import Target

#: What diffusers' code says where a processor reads fused projections.
_READS_FUSED = re.compile(r"\bto_qkv\b|\bfused_projections\b|_get_qkv_projections|_get_fused_projections")


class FuseQKV(ModelPass):
    """Fuse the query, key and value projections of attention into one matrix, and delete the originals.

    diffusers' `fuse_qkv_projections` keeps the originals, and some classes ignore the result. Here the originals are
    deleted, and a class that would ignore the fused matrix is refused.
    """

    name: ClassVar[str] = "fuse_qkv"
    summary: ClassVar[str] = "fuse query, key and value projections; the originals are deleted"
    before: ClassVar = {
        "quantize": "quantized projections cannot be concatenated",
        "sparsify": "sparse projections cannot be concatenated",
        "layerwise_cast": "diffusers concatenates weights in the type that they compute in",
    }
    requires_not: ClassVar = {
        "quantized": "quantized projections cannot be concatenated. Put fuse_qkv before quantize",
        "gguf": "a GGUF file has quantized projections, which cannot be concatenated. Give the original weights",
    }
    examples: ClassVar = ({"name": "fuse_qkv", "component": "transformer"},)

    def provides(self) -> Iterable[Fact]:
        return [Fact("qkv_fused", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        name = type(module).__name__
        if not callable(getattr(module, "fuse_qkv_projections", None)):
            yield Problem(
                where, f"{name} cannot fuse its projections: diffusers gives it no fuse_qkv_projections", "Remove it."
            )
        elif added := _added_projections(module):
            yield Problem(where, f"{name} cannot fuse its projections: diffusers refuses {added}", "Remove it.")
        elif not any(True for _ in _fusable(module)):
            yield Problem(where, f"{name} has no attention whose fused projections diffusers would use", "Remove it.")
        elif lost := _lost(module):
            yield Problem(where, f"{name} would give other results: {lost}", "Remove it.")

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        from diffusers.models.modeling_utils import no_init_weights

        fused: list[torch.nn.Module] = []
        with no_init_weights(), _dropping_originals(module, fused):
            module.fuse_qkv_projections()  # type: ignore[operator]
        return [f"{len(fused)} attentions fused, originals deleted"] if fused else []


@contextmanager
def _dropping_originals(module: torch.nn.Module, fused: list[torch.nn.Module]) -> Iterator[None]:
    """Makes an attention that fuses its projections drop the originals before the next one fuses, inside the `with`
    block.

    Otherwise both would be in memory for the whole model. An attention whose processor would ignore fused projections
    is left as it is.
    """
    usable = {id(part) for part in _fusable(module)}

    def dropping(attention: torch.nn.Module, fuse: Callable[..., None]) -> Callable[..., None]:
        def fuse_projections(*args: Any, **kwargs: Any) -> None:
            if id(attention) not in usable:
                return
            fuse(*args, **kwargs)
            if _drop_originals(attention):
                fused.append(attention)

        return fuse_projections

    attentions = [part for part in module.modules() if callable(getattr(part, "fuse_projections", None))]
    for part in attentions:
        part.__dict__["fuse_projections"] = dropping(part, part.fuse_projections)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for part in attentions:
            del part.__dict__["fuse_projections"]


def _drop_originals(attention: torch.nn.Module) -> bool:
    """Deletes the projections that fused ones replace. Returns True if there were any."""
    present = [name for name in FUSED if getattr(attention, name, None) is not None]
    if not getattr(attention, "fused_projections", False) or not present:
        return False
    for name in present:
        getattr(attention, name).requires_grad_(False)
    for name in _covered(present):
        if getattr(attention, name, None) is not None:
            delattr(attention, name)
            setattr(attention, name, None)
    return True


def _covered(fused: Sequence[str]) -> list[str]:
    """Returns the original projections that the fused ones replace."""
    return list(dict.fromkeys(part for name in fused for part in FUSED[name]))


def _fusable(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Attentions whose projections `fuse_qkv_projections` fuses, and whose processor will read what it fused.

    There are two ways in diffusers: attention classes that fuse themselves and whose processors look whether they did,
    and a model's own `fuse_qkv_projections`, which gives the common `Attention` another processor.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    swaps_processors = _swapped_in(module) is not None
    for part in module.modules():
        if isinstance(part, AttentionModuleMixin):
            if part._supports_qkv_fusion and _reads_fused(type(part.processor)):  # type: ignore[attr-defined]
                yield part
        elif isinstance(part, Attention) and swaps_processors:
            yield part


def _added_projections(module: torch.nn.Module) -> str:
    """Returns the processor of added projections that `fuse_qkv_projections` raises for: diffusers looks for it by
    name.
    """
    processors = getattr(module, "attn_processors", {})
    return next((name for name in sorted({type(p).__name__ for p in processors.values()}) if "Added" in name), "")


def _swapped_in(module: torch.nn.Module) -> type | None:
    """Returns the processor that the model's own `fuse_qkv_projections` gives to its attentions."""
    own = type(module).fuse_qkv_projections  # type: ignore[attr-defined]
    named = re.search(r"set_attn_processor\((Fused\w+)\(", inspect.getsource(own))
    return getattr(sys.modules[own.__module__], named[1], None) if named else None


def _lost(module: torch.nn.Module) -> str:
    """Returns a part of an attention that the swapped-in processor leaves out, such as the norms of SD 3.5.

    The reverse also counts: the joint processor reads a text stream, which the second attention of a dual block does
    not have.
    """
    from diffusers.models.attention_processor import Attention

    processor = _swapped_in(module)
    source = _source(processor) if processor else ""
    for path, part in module.named_modules():
        if processor is None or not isinstance(part, Attention):
            continue
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            if getattr(part, norm, None) is not None and norm not in source:
                return f"diffusers' {processor.__name__} leaves out {path}.{norm}"
        if getattr(part.to_k, "out_features", None) != getattr(part.to_q, "out_features", None):
            return f"diffusers' {processor.__name__} takes keys for as wide as queries, and those of {path} are not"
        if processor.__name__ == "FusedJointAttnProcessor2_0" and getattr(part, "add_k_proj", None) is None:
            return f"diffusers' {processor.__name__} reads a text stream, which {path} lacks"
    return ""


@cache
def _reads_fused(processor: type) -> bool:
    """Returns True if the processor's own code, or a helper that it calls in its module, reads fused projections."""
    source = _source(processor)
    if _READS_FUSED.search(source):
        return True
    home = sys.modules[processor.__module__]
    called = {name for name in re.findall(r"\b(_\w+)\(", source) if inspect.isfunction(getattr(home, name, None))}
    return any(_READS_FUSED.search(inspect.getsource(getattr(home, name))) for name in called)


@cache
def _source(kind: type) -> str:
    """Returns the code of a class's own methods, which is faster than parsing its file. Empty if it has none."""
    try:
        return "\n".join(inspect.getsource(item) for item in vars(kind).values() if inspect.isfunction(item))
    except OSError:
        return ""


PLUGIN = FuseQKV
