"""How Python values that hold tensors are taken apart and described: arguments and results of components, regions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import type_of

Literal = (bool, int, float, str, type(None))


@functools.cache
def _know_distributions() -> None:
    """Teaches flattening the distribution that an autoencoder's encoder gives, as the tensor of its parameters."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def taken_apart(given: Any) -> tuple[list[Any], Any]:
        return [given.parameters], given.deterministic

    def remade(leaves: Any, deterministic: Any) -> Any:
        return DiagonalGaussianDistribution(next(iter(leaves)), deterministic)

    name = f"{DiagonalGaussianDistribution.__module__}.{DiagonalGaussianDistribution.__qualname__}"
    pytree.register_pytree_node(DiagonalGaussianDistribution, taken_apart, remade, serialized_type_name=name)


def flatten(nest: Any) -> tuple[list[Any], Any]:
    """Leaves and structure; model outputs of diffusers and transformers are known to pytree."""
    _know_distributions()
    return pytree.tree_flatten(nest)


def unflatten(leaves: list[Any], structure: Any) -> Any:
    return pytree.tree_unflatten(leaves, structure)


def key_of(leaves: list[Any], structure: Any) -> str:
    """Returns the key of a call's program: the structure, tensor types and all other leaves."""
    parts = [str(type_of(leaf)) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
    return "|".join([str(structure), *parts])


def describe(nest: Any, tensor: Callable[[torch.Tensor], Any], what: str) -> Any:
    """Returns the nest as tuples, dicts and literals, with every tensor replaced by `tensor(tensor)`.

    Raises:
        RecordError: something else stands in it.
    """
    if isinstance(nest, torch.Tensor):
        return tensor(nest)
    if isinstance(nest, Literal):
        return nest
    if isinstance(nest, (tuple, list)):
        return tuple(describe(item, tensor, what) for item in nest)
    if isinstance(nest, Mapping):
        return {str(key): describe(item, tensor, what) for key, item in nest.items()}
    if isinstance(nest, torch.dtype):
        return str(nest)
    raise RecordError(f"{what}: a value of type {type(nest).__name__} cannot be written down")


def names_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Returns a readable name for every leaf of (args, kwargs), after the parameters of `function`, in flattening
    order.
    """
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names: list[str] = []
    for index, arg in enumerate(args):
        base = parameters[index].name if index < len(parameters) else f"arg{index}"
        names += _names(base, arg)
    for key, arg in kwargs.items():
        names += _names(key, arg)
    return names


def _names(base: str, arg: Any) -> list[str]:
    leaves = pytree.tree_leaves(arg)
    return [base] if len(leaves) == 1 else [f"{base}.{index}" for index in range(len(leaves))]
