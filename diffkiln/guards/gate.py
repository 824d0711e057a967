"""The gate for exceptions: out of a public function come errors of `diffkiln.errors` alone.

Whatever else is raised below becomes one of them, with the first as its cause: what memory and the system lack, and
what nobody foresaw, which is an internal fault. Those of native extensions count, though some are no `Exception`.
"""

from __future__ import annotations

import functools
import inspect
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from diffkiln.errors import DiffkilnError, InternalFault, OutOfMemory, SystemRefused

P = ParamSpec("P")
R = TypeVar("R")

# What ends a program or a generator, and warnings that the user has turned into errors.
_PASSING = (DiffkilnError, KeyboardInterrupt, SystemExit, GeneratorExit, Warning)
_CALLERS = "_diffkiln_raised_by_caller"
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def gated(*callbacks: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a public function raise errors of ours alone.

    Args:
        callbacks: Names of arguments that take a function of the caller. What that function raises is the caller's
            own, and comes back unchanged.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        what = function.__qualname__.removesuffix(".__call__")
        positions = [
            position for position, name in enumerate(inspect.signature(function).parameters) if name in callbacks
        ]

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> R:
            given = list(args)
            for position in positions[: bisect_left(positions, len(given))]:
                given[position] = _callers(given[position])
            kwargs |= {name: _callers(kwargs[name]) for name in callbacks if name in kwargs}
            try:
                return cast(Any, function)(*given, **kwargs)
            except _PASSING:
                raise
            except BaseException as error:
                # Without a frame below this one the arguments do not fit the signature: Python's own error is right.
                if hasattr(error, _CALLERS) or (error.__traceback__ and error.__traceback__.tb_next is None):
                    raise
                raise ours(error, what) from error

        return cast("Callable[P, R]", guarded)

    return decorate


def ours(error: BaseException, what: str) -> DiffkilnError:
    """Returns the error of ours that says what `error`, raised within `what`, comes to."""
    words = " ".join(f"{type(error).__name__}: {_said(error)}".split())[:500]
    if is_no_memory(error):
        return OutOfMemory(f"{what}: this machine has too little memory ({words}). Free some, or offload weights")
    if isinstance(error, OSError) and error.errno is not None:
        named = f" ({error.filename})" if error.filename else ""
        return SystemRefused(f"{what}: the system refuses it: {error.strerror}{named}. Mend that, and try again")
    return InternalFault(
        f"{what}: internal fault, {words}. This is a defect of diffkiln: please report it. DIFFKILN_DEBUG=1 shows where"
    )


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # a class of a stranger may fail at this as well
        return "it cannot say why"


def is_no_memory(error: BaseException) -> bool:
    """Returns True for Python's error and for torch's, which is known by its name since torch is not imported here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in _said(error) for words in _NO_MEMORY)


def _callers(function: Any) -> Any:
    """Returns a function that marks what the caller's own function raises; what is not a function stays what it is."""
    if not callable(function):
        return function

    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            setattr(error, _CALLERS, True)
            raise

    return marked
