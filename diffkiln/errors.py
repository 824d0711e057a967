"""Every error that diffkiln raises on purpose, and the exit code that the command line gives it.

    DiffkilnError
    ├── SpecError              2   the spec, the usage or the source is wrong (what the spec alone shows)
    │   ├── SourceError        2   the source model is not there, is incomplete or is not a diffusers pipeline
    │   └── PolicyInvalid      2   the policy of trust is not there or is not one
    ├── IllegalPlan            3   what only the model's configuration shows: unknown component, wrong order, no effect
    ├── BuildError             4   the build failed
    │   ├── PassError          4   a pass raised or broke the plan
    │   ├── RecordError        4   the pipeline's call cannot be written down as a program
    │   │   └── DataDependent  4   … because its control flow or its shapes depend on the request's data
    │   ├── ExportError        4   a backend could not lower a region
    │   ├── VerifyError        4   a program or an engine does not give the pipeline's result
    │   └── OutputBusy         4   another process is writing the same output
    ├── HubError               2   the Hub does not give, or take, what was asked for: not there, not allowed, refused
    │   └── HubUnavailable     2   … now: offline, too many requests, a broken connection. Trying again can help
    ├── CallError              2   a call of a loaded pipeline with arguments that no variant was compiled for
    ├── Incompatible           5   the bundle is for another machine, torch, format or feature
    │   ├── MissingDependency  5   a package that the bundle or the command needs is not installed
    │   ├── OutOfMemory        5   the machine, or its GPU, has not enough memory; also a MemoryError
    │   └── SystemRefused      5   the system refuses something: room on a disk, a permission, a file more to open
    ├── InternalFault         70   a defect of diffkiln, with the exception that nobody foresaw as its cause
    └── IntegrityError         6   the bundle's bytes or their origin are not what they should be
        ├── ManifestInvalid    6   the manifest is not one
        ├── DigestMismatch     6   a file is not the one that was hashed
        ├── Incomplete         6   a file is missing
        ├── UnexpectedFile     6   a file is there that the manifest does not name
        ├── PathEscape         6   a path leaves the bundle or is not a plain file
        ├── NativeCodeRefused  6   native code that the user has not allowed
        ├── LimitExceeded      6   it asks for more memory, time or text than the user's limits allow
        ├── SignatureInvalid   6   the signature is broken, or is of another manifest
        └── SignerRefused      6   the policy wants a signature of an identity that it pins, and there is none

A `Problem` is one thing that is wrong; errors that can collect several carry them in `.problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffkiln.guards.printable import MAX_MESSAGE, printable


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a JSON path such as `$.passes[1].type`), why, and the hint."""

    where: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.reason}" if self.where else self.reason
        return f"{text}. {self.hint}" if self.hint else text

    @property
    def mend(self) -> str:
        """Returns the hint, as it was called in earlier versions."""
        return self.hint


class DiffkilnError(Exception):
    """Root of the tree. `str(error)` is a message for a person; `exit_code` is what the command returns.

    Messages quote what strangers wrote, so hidden characters in them are escaped.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, message: str = "", *, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        if not message:
            message = "\n".join(str(problem) for problem in self.problems)
        super().__init__(printable(message, MAX_MESSAGE, lines=True))


class SpecError(DiffkilnError):
    exit_code = 2


def gather_problems(*looks: Callable[[], Any]) -> list[Any]:
    """What each look returns; where several raise `SpecError`, one with the problems of all, and else the one."""
    found: list[Any] = []
    errors: list[SpecError] = []
    for look in looks:
        try:
            found.append(look())
        except SpecError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SpecError(problems=[p for error in errors for p in error.problems or (Problem("", str(error)),)])
    return found


class SourceError(SpecError):
    pass


class PolicyInvalid(SpecError):
    pass


class IllegalPlan(DiffkilnError):
    exit_code = 3


class BuildError(DiffkilnError):
    exit_code = 4


class PassError(BuildError):
    pass


class RecordError(BuildError):
    pass


class DataDependent(RecordError):
    pass


class ExportError(BuildError):
    pass


class VerifyError(BuildError):
    pass


class OutputBusy(BuildError):
    pass


class HubError(DiffkilnError):
    """`status` is that of HTTP, where the Hub answered with one."""

    exit_code = 2

    def __init__(self, message: str = "", *, problems: Sequence[Problem] = (), status: int | None = None) -> None:
        super().__init__(message, problems=problems)
        self.status = status


class HubUnavailable(HubError):
    pass


class CallError(DiffkilnError, ValueError):
    exit_code = 2


class Incompatible(DiffkilnError):
    exit_code = 5


class MissingDependency(Incompatible):
    pass


class OutOfMemory(Incompatible, MemoryError):
    pass


class SystemRefused(Incompatible):
    pass


class InternalFault(DiffkilnError):
    exit_code = 70


class IntegrityError(DiffkilnError):
    exit_code = 6


class ManifestInvalid(IntegrityError):
    pass


class DigestMismatch(IntegrityError):
    pass


class Incomplete(IntegrityError):
    pass


class UnexpectedFile(IntegrityError):
    pass


class PathEscape(IntegrityError):
    pass


class NativeCodeRefused(IntegrityError):
    pass


class LimitExceeded(IntegrityError):
    pass


class SignatureInvalid(IntegrityError):
    pass


class SignerRefused(IntegrityError):
    pass
