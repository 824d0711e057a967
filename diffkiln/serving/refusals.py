"""What a request is refused with: a status of HTTP, and a reason in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkiln.errors import CallError, DiffkilnError, LimitExceeded, OutOfMemory, SystemRefused

#: A status for the errors that a call may raise; the first class that fits counts.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (CallError, 400),
    (LimitExceeded, 400),
    (OutOfMemory, 503),
    (SystemRefused, 503),
)
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer other than the one that was asked for.

    Attributes:
        status: Of HTTP.
        reason: A sentence for a person.
        param: The field of the request that is at fault.
        retry_after: Seconds after which to try again.
    """

    def __init__(self, status: int, reason: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(status, reason, param, retry_after)
        self.status, self.reason, self.param, self.retry_after = status, reason, param, retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        """Returns what goes into the head of the answer."""
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    @property
    def body(self) -> dict[str, Any]:
        """Returns the answer as OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.reason, "type": kind, "param": self.param, "code": None}}


def refusal_of(error: Exception) -> Refusal:
    """Returns the refusal that an error of a call comes to. What is our own fault does not say more than that."""
    if isinstance(error, Refusal):
        return error
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return Refusal(status, str(error), retry_after=1 if status == 503 else None)
    if isinstance(error, DiffkilnError):
        return Refusal(500, f"the call failed ({type(error).__name__}); the server's log has the reason")
    return Refusal(500, "internal fault; the server's log has the reason")


def late() -> Refusal:
    """Returns what is said when the deadline has passed."""
    return Refusal(504, "this took longer than the server allows. Ask for fewer images, or try again later")
