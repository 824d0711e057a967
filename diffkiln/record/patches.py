"""Methods whose shapes follow the prompt's length, replaced by others of a fixed length while a call is recorded.

The families (diffkiln.families) bring the patches. A patch is made for one text of a method, and is found by the
method's name and that text among the classes that a pipeline is made of, so that derived pipelines have it too. Where
the libraries have another text nothing is replaced, and the recording stops where the method reads the length.

What the patches claim is verified at every build (diffkiln.compiler.verify): the call bit for bit, components within
rounding.
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
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
from torch.nn import functional

from diffkiln.interpreter.modular import blocks_of
from diffkiln.plugins import plugins
from diffkiln.record.processors import processors_of

#: What has a method or a function of a patch.
Owner = type | ModuleType


def whole(tensor: Any, _args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> Any:
    """Returns the tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Padding:
    """The differences between diffusers and the program in one component's arguments.

    Attributes:
        pad: diffusers' own (args, kwargs) → the program's, at the fixed length. Bit for bit what the program gives.
        cut: a tensor of the program's result, and diffusers' own (args, kwargs) → the tensor as diffusers has it.
        used: a tensor of diffusers' result or of the program's, and diffusers' own (args, kwargs) → the part of it that
            the call uses, the same for both.
    """

    pad: Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    cut: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = whole
    used: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = whole


@dataclass(frozen=True, eq=False)
class Patch:
    """One method at a fixed length.

    Attributes:
        prints: the name of the method, and of the others that the patch stands for, with the `fingerprint` of each. A
            method of another class of the same module is "Class.name"; others may be functions of that module. A space
            is between texts that all fit.
        replacement: a function that takes the method's place.
        known_in: names of classes, with spaces between, that have the method in the tested releases. No match depends
            on them: they say which method changed when nothing fits (`outdated`), and where the tests look.
        function: the name is that of a function beside the pipeline's class, not of a method.
        around: the replacement takes the method, and gives what takes its place and calls it.
        refuses: the replacement does nothing but say why the method is not recorded.
        uncounted: it is not needed where the spec fixes the number of a prompt's tokens.
        outside: no length is fixed, and blocks are called as diffusers calls them.
        paddings: of a pipeline's method: a pipeline and the keywords of its call, with defaults → how the arguments of
            its components differ.
    """

    prints: Mapping[str, str]
    replacement: Callable[..., Any]
    known_in: str = ""
    function: bool = False
    around: bool = False
    refuses: bool = False
    uncounted: bool = False
    outside: bool = False
    paddings: Callable[[Any, Mapping[str, Any]], dict[str, Padding]] | None = None

    @property
    def method(self) -> str:
        """Returns the name of the method."""
        return next(iter(self.prints))

    def fits(self, owner: Owner, kind: type) -> bool:
        """Returns True if the patch was made for these methods: that of `owner`, and those that `kind` calls with it.

        Args:
            owner: the class that has the method, or the module that has the function.
            kind: the same class, or one that is derived from it and may have others of the methods.
        """
        prints = self.prints.items()
        return all(fingerprint(self._stands_for(owner, kind, name)) in known.split() for name, known in prints)

    def _stands_for(self, owner: Owner, kind: type, name: str) -> Any:
        module = sys.modules[kind.__module__ if isinstance(owner, ModuleType) else owner.__module__]
        if self.function:
            return vars(owner if isinstance(owner, ModuleType) else module).get(name)
        other, _, method = name.rpartition(".")
        if other:
            return vars(getattr(module, other, object)).get(method)
        if name == self.method:
            return vars(owner).get(name)
        return inspect.getattr_static(kind, name, vars(module).get(name))

    def made_for(self, owner: Owner) -> Callable[..., Any]:
        """Returns what takes the method's place in this class."""
        return self.replacement(getattr(owner, self.method)) if self.around else self.replacement


def known_patches() -> tuple[Patch, ...]:
    """Returns the patches of all families."""
    families = (plugin.load() for plugin in plugins("families").values())
    return tuple(patch for family in families for patch in family.patches)


@contextlib.contextmanager
def fixed_lengths(part: Any, counted: bool = False) -> Iterator[None]:
    """Gives a pipeline or a module a fixed length wherever its shapes follow the prompt's, inside the `with` block.

    Args:
        part: the pipeline or the module.
        counted: the number of a prompt's tokens is fixed, so that fewer methods have to be replaced.
    """
    fitting = (found for found in _fitting(_parts(part)) if not (counted and found[1].uncounted))
    patches = {(owner, patch.method): patch for owner, patch in fitting}
    with contextlib.ExitStack() as stack:
        for (owner, method), patch in patches.items():
            stack.enter_context(mock.patch.object(owner, method, patch.made_for(owner)))
        yield


def paddings(pipe: Any, fixed: Mapping[str, Any], counted: bool = False) -> dict[str, Padding]:
    """Returns how a pipeline's program calls components with other arguments than diffusers does, by their names.

    Args:
        pipe: the pipeline.
        fixed: the keywords of its call, with defaults.
        counted: as `fixed_lengths` has it.
    """
    fitting = (patch for _, patch in _fitting([pipe, *blocks_of(pipe)]) if not (counted and patch.uncounted))
    found = (patch.paddings for patch in fitting if patch.paddings)
    padded = next(found, None)
    return padded(pipe, fixed) if padded else {}


def is_patched(module: torch.nn.Module, counted: bool = False) -> bool:
    """Returns True if `fixed_lengths` replaces a method of a component, or of an attention processor in it."""
    fitting = _fitting([module, *processors_of(module).values()])
    return any(not (counted and patch.uncounted) for _, patch in fitting)


def of_fixed_length(pipe: Any, fixed: Mapping[str, Any]) -> set[str]:
    """Returns the components that a program calls at another length than diffusers, or that compute at another one.

    Not those in which only the attention differs: their blocks are called as diffusers calls them.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    fixed_inside = {
        name for name, module in modules.items() if any(not patch.outside for _, patch in _fitting([module]))
    }
    return fixed_inside | paddings(pipe, fixed).keys()


def outdated(pipe: Any) -> str:
    """Returns the methods that have a patch made for another text of them, as words; "" if there are none.

    An example is "diffusers' WanPipeline.encode_prompt".
    """
    names = []
    for owner, kind, patch in _named(_parts(pipe)):
        known = kind if isinstance(owner, ModuleType) else owner
        if known.__name__ in patch.known_in.split() and not patch.refuses and not patch.fits(owner, kind):
            names.append(f"{known.__module__.partition('.')[0]}' {known.__name__}.{patch.method}")
    return ", ".join(dict.fromkeys(names))


def _fitting(parts: Iterable[Any]) -> Iterator[tuple[Owner, Patch]]:
    """Returns the classes of these objects, and their modules, that have a method with a patch that fits."""
    return ((owner, patch) for owner, kind, patch in _named(parts) if patch.fits(owner, kind))


def _named(parts: Iterable[Any]) -> Iterator[tuple[Owner, type, Patch]]:
    """Yields each class, or module, that has a method of a patch's name, and the class that is derived from it."""
    patches: dict[tuple[str, bool], list[Patch]] = {}
    for patch in known_patches():
        patches.setdefault((patch.method, patch.function), []).append(patch)
    for kind in dict.fromkeys(map(type, parts)):
        for owner in (*kind.__mro__, *_modules(kind)):
            names = {(name, isinstance(owner, ModuleType)) for name in vars(owner)}
            for name in sorted(names & patches.keys()):
                for patch in patches[name]:
                    yield owner, kind, patch


def _modules(kind: type) -> Iterable[ModuleType]:
    """Returns the modules that define a class and those that it is derived from."""
    return dict.fromkeys(sys.modules[owner.__module__] for owner in kind.__mro__ if owner.__module__ in sys.modules)


def _parts(part: Any) -> Iterator[Any]:
    """Yields a module and all within it, attention processors too; or a pipeline, the blocks or the pipelines that it
    is made of, its components and its processors of images."""
    if isinstance(part, torch.nn.Module):
        yield from part.modules()
        yield from processors_of(part).values()
        return
    yield part
    yield from blocks_of(part)
    components = getattr(part, "components", {})
    if components:
        yield from (own for name, own in vars(part).items() if name.endswith(("_processor", "_pipe")))
    for component in components.values():
        yield from _parts(component)


@functools.cache
def fingerprint(function: Any) -> str:
    """Returns a digest of a function's code: its text without comments, docstring, annotations and decorators.

    "" where there is no such text.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, SyntaxError, TypeError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    tree.decorator_list, tree.returns = [], None
    for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def resized(
    tensor: torch.Tensor, length: int, value: float = 0, side: Literal["left", "right"] = "right"
) -> torch.Tensor:
    """Returns [batch, length, …] cut, or filled with `value`, on one side of the second dimension."""
    missing = length - tensor.shape[1]
    sides = (missing, 0) if side == "left" else (0, missing)
    return functional.pad(tensor, (*([0, 0] * (tensor.ndim - 2)), *sides), value=value)
