"""Methods of diffusers whose shapes follow the prompt's length, replaced while a call is recorded.

A rewrite gives the same numbers at a fixed length. It is made for one text of a method: where diffusers has another,
nothing is replaced, and the recording stops where the method reads the length.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Rewrite:
    """One method at a fixed length.

    Attributes:
        owners: "module:Class" of the classes that have it, under `library`.
        method: its name.
        prints: `fingerprint` of every method that the rewrite stands for: by its name, or by "Class.name" for a method
            of another class of the owner's module.
        replacement: a function that takes the method's place.
        around: the replacement takes the method, and gives what takes its place and calls it.
        library: diffusers or transformers.
        refuses: the replacement does nothing but say why the method is not recorded.
    """

    owners: tuple[str, ...]
    method: str
    prints: Mapping[str, str]
    replacement: Callable[..., Any]
    around: bool = False
    library: str = "diffusers"
    refuses: bool = False

    def classes(self) -> Iterator[type]:
        """The owners among the classes that are loaded."""
        for owner in self.owners:
            module, _, name = owner.partition(":")
            found = getattr(sys.modules.get(f"{self.library}.{module}"), name, None)
            if found is not None:
                yield found

    def fits(self, owner: type) -> bool:
        """Whether the methods of this class are those that the rewrite was made for."""
        return all(fingerprint(self.stands_for(owner, name)) == known for name, known in self.prints.items())

    def made_for(self, owner: type) -> Callable[..., Any]:
        """What takes the method's place in this class."""
        return self.replacement(getattr(owner, self.method)) if self.around else self.replacement

    def stands_for(self, owner: type, name: str) -> Any:
        """The method that a key of `prints` names; None where there is none."""
        other, _, method = name.rpartition(".")
        holder = getattr(sys.modules[owner.__module__], other, None) if other else owner
        return getattr(holder, "__dict__", {}).get(method)


def resized(
    tensor: torch.Tensor, length: int, value: float = 0, side: Literal["left", "right"] = "right"
) -> torch.Tensor:
    """[batch, length, …]: cut, or filled with `value`, on one side of the second dimension."""
    missing = length - tensor.shape[1]
    sides = (missing, 0) if side == "left" else (0, missing)
    return functional.pad(tensor, (*([0, 0] * (tensor.ndim - 2)), *sides), value=value)


def whole(tensor: Any, _args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> Any:
    """The tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Padding:
    """How the arguments of one component differ between diffusers and the program.

    Attributes:
        pad: diffusers' own (args, kwargs) → the program's, at the fixed length. Bit for bit what the program gives.
        cut: a tensor of the program's result, and diffusers' own (args, kwargs) → the tensor as diffusers has it.
        used: a tensor of diffusers' result or of the program's, and diffusers' own (args, kwargs) → the part of it that
            the call uses, the same for both.
    """

    pad: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    cut: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = whole
    used: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = whole


@functools.cache
def fingerprint(function: Any) -> str:
    """A digest of a function's code: its text without comments, docstring, annotations and decorators."""
    if function is None:
        return ""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        return ""
    tree.decorator_list, tree.returns = [], None
    for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


@contextlib.contextmanager
def replaced(rewrites: Iterable[Rewrite]) -> Iterator[None]:
    """While it lasts, the methods that the rewrites were made for are replaced."""
    with contextlib.ExitStack() as stack:
        for rewrite in rewrites:
            for owner in [owner for owner in rewrite.classes() if rewrite.fits(owner)]:
                stack.enter_context(mock.patch.object(owner, rewrite.method, rewrite.made_for(owner)))
        yield
