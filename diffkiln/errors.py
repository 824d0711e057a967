"""Every error that diffkiln raises on purpose, and the exit code that the command line gives it.

    DiffkilnError
    ├── SpecError              2   the spec, the usage or the source is wrong
    │   ├── SourceError        2   the source model is missing, incomplete or not a diffusers pipeline
    │   └── PolicyInvalid      2   the policy of trust is missing or malformed
    ├── IllegalPlan            3   the model or the target does not allow a pass
    ├── BuildError             4   the build failed
    │   ├── PassError          4   a pass raised or broke the plan
    │   ├── RecordError        4   the pipeline's call cannot be written down as a program
    │   │   └── DataDependent  4   … because its control flow or its shapes depend on the request's data
    │   ├── ExportError        4   a backend could not lower a region
    │   ├── VerifyError        4   a program or an engine does not give the pipeline's result
    │   ├── QualityError       4   the bundle does not keep a gate of quality
    │   └── OutputBusy         4   another process is writing the same output
    ├── HubError               2   the Hub refuses: no such repository, no permission
    │   └── HubUnavailable     2   … now: offline, too many requests, a broken connection. Trying again can help
    ├── CallError              2   a call of a loaded pipeline with arguments that no variant was compiled for
    │   └── AttributeRefused   2   an attribute of the original pipeline that is not there; also an AttributeError
    ├── Busy                  75   a loaded pipeline is busy with calls of other threads. Trying again can help
    ├── PeerLost              75   another of the processes that run a call together ended. Starting all anew can help
    ├── NotFinite              7   a call's result is no picture: numbers that overflowed
    ├── Incompatible           5   the bundle is for another machine, torch, format or feature
    │   ├── MissingDependency  5   a package that the bundle or the command needs is not installed
    │   ├── OutOfMemory        5   the machine, or its GPU, has too little memory; also a MemoryError
    │   └── SystemRefused      5   the system refuses: no room on a disk, no permission, too many open files
    ├── InternalFault         70   a defect of diffkiln, with the exception that nobody foresaw as its cause
    └── IntegrityError         6   the bundle's bytes or origin are not what they should be
        ├── ManifestInvalid    6   the manifest is malformed
        ├── DigestMismatch     6   a file is not the one that was hashed
        ├── Incomplete         6   a file is missing
        ├── UnexpectedFile     6   the manifest does not name a file that is there
        ├── PathEscape         6   a path leaves the bundle or is not a plain file
        ├── NativeCodeRefused  6   native code that the user has not allowed
        ├── LimitExceeded      6   a demand exceeds the user's limits of memory, time or text
        ├── SignatureInvalid   6   the signature is broken, or is of another manifest
        └── SignerRefused      6   the policy requires a signature of a pinned identity, and there is none

A `Problem` is one mistake; errors that collect several carry them in `.problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffkiln.guards.printable import MAX_MESSAGE, printable


@dataclass(frozen=True)
class Problem:
    """One mistake: its place (a JSON path such as `$.passes[1].type`), the reason, and a hint."""

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
    """A mistake in the spec, the usage or the source."""

    exit_code = 2


def gather_problems(*looks: Callable[[], Any]) -> list[Any]:
    """Returns the result of each look. If several raise `SpecError`, raises one error with all problems."""
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
    """A source model that is missing, incomplete or not a diffusers pipeline."""


class PolicyInvalid(SpecError):
    """A policy of trust that is missing or malformed."""


class IllegalPlan(DiffkilnError):
    """A pass that the model or the target does not allow."""

    exit_code = 3


class BuildError(DiffkilnError):
    """A build that failed."""

    exit_code = 4


class PassError(BuildError):
    """A pass that failed or broke the plan."""


class RecordError(BuildError):
    """A pipeline's call that cannot be written down as a program."""


class DataDependent(RecordError):
    """A call whose control flow or shapes depend on the request's data."""


class ExportError(BuildError):
    """A region that a backend cannot lower."""


class VerifyError(BuildError):
    """A program or an engine that does not give the pipeline's result."""


class QualityError(BuildError):
    """A bundle that does not keep a gate of quality."""


class OutputBusy(BuildError):
    """An output that another process is writing."""


class HubError(DiffkilnError):
    """An error of the Hub. `status` is that of HTTP, if the Hub answered with one."""

    exit_code = 2

    def __init__(self, message: str = "", *, problems: Sequence[Problem] = (), status: int | None = None) -> None:
        super().__init__(message, problems=problems)
        self.status = status


class HubUnavailable(HubError):
    """A failure of the Hub that may pass: offline, too many requests, a broken connection."""


class CallError(DiffkilnError, ValueError):
    """A call with arguments that no variant was compiled for."""

    exit_code = 2


class AttributeRefused(CallError, AttributeError):
    pass


class Busy(DiffkilnError):
    """`code` is "busy", as a service tells it to its clients. The exit code is that of sysexits.h for "try again"."""

    code: ClassVar[str] = "busy"
    exit_code = 75


class PeerLost(DiffkilnError):
    """An end of another of the processes that run a call together. The exit code is that of sysexits.h for "try
    again"."""

    exit_code = 75


class NotFinite(DiffkilnError):
    exit_code = 7


class Incompatible(DiffkilnError):
    """A bundle for another machine, torch, format or feature."""

    exit_code = 5


class MissingDependency(Incompatible):
    """A package that the bundle or the command needs is not installed."""


class OutOfMemory(Incompatible, MemoryError):
    """Too little memory on the machine or its GPU; also a MemoryError."""


class SystemRefused(Incompatible):
    """A refusal of the system: no room on a disk, no permission, too many open files."""


class InternalFault(DiffkilnError):
    """A defect of diffkiln; its cause is the exception that nobody foresaw."""

    exit_code = 70


class IntegrityError(DiffkilnError):
    """A bundle whose bytes or origin are not what they should be."""

    exit_code = 6


class ManifestInvalid(IntegrityError):
    """A malformed manifest."""


class DigestMismatch(IntegrityError):
    """A file that is not the one that was hashed."""


class Incomplete(IntegrityError):
    """A file that is missing."""


class UnexpectedFile(IntegrityError):
    """A file that the manifest does not name."""


class PathEscape(IntegrityError):
    """A path that leaves the bundle or is not a plain file."""


class NativeCodeRefused(IntegrityError):
    """Native code that the user has not allowed."""


class LimitExceeded(IntegrityError):
    """A demand for more memory, time or text than the user's limits allow."""


class SignatureInvalid(IntegrityError):
    """A signature that is broken, or of another manifest."""


class SignerRefused(IntegrityError):
    """A missing signature of a pinned identity that the policy requires."""
