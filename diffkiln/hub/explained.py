"""What huggingface_hub raises, in our own words: what was asked of which repository, why it failed, and the hint.

Messages are made from what kind of failure it is; what a server or a library says is quoted only after every token and
every query of a URL (which may be a signature) was taken out of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffkiln.errors import BuildError, DiffkilnError, HubError, HubUnavailable, MissingDependency

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_.-]{4,}|(?i:\bbearer\s+)[^\s,;]+")
_QUERY = re.compile(r"(https?://[^\s?]+)\?\S+")
_BUSY = frozenset({408, 425, 429})
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token"
_SETTINGS = "https://huggingface.co/settings/tokens"
_AGAIN = "Try again later: the transferred files are kept"


@contextmanager
def asking(repo: str, doing: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into diffkiln's own. `doing` is the verb before the repository's name in
    messages.

    Raises:
        HubUnavailable, HubError: the Hub, or the way to it, failed.
        BuildError: a file cannot be written here.
        MissingDependency: huggingface_hub is not installed.
    """
    try:
        yield
    except DiffkilnError:
        raise
    except ModuleNotFoundError as error:
        raise MissingDependency(f"the Hub needs the package {error.name}: pip install 'diffkiln[hub]'") from error
    except Exception as error:
        # A traceback prints the causes too, so one that holds a token is not kept.
        words = f"{error} {error.__cause__} {error.__context__}"
        raise explained(error, repo, doing) from (error if redacted(words) == words else None)


def explained(error: Exception, repo: str, doing: str) -> DiffkilnError:
    """Returns diffkiln's error for `error`, raised by huggingface_hub."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    what = f"cannot {doing} {repo}"
    cause = _decisive(error, (HfHubHTTPError, OfflineModeIsEnabled))
    if isinstance(cause, OfflineModeIsEnabled):
        return HubUnavailable(f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it")
    if isinstance(cause, GatedRepoError):
        return HubError(
            f"{what}: it is given to registered users only. Accept its terms at https://huggingface.co/{repo} "
            "with the account whose token is used, and log in: `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(cause, RevisionNotFoundError):
        return HubError(f"{what}: it lacks this revision. Look at https://huggingface.co/{repo}/commits/main")
    if isinstance(cause, HfHubHTTPError):
        return _of_status(what, repo, cause.response.status_code, cause.server_message or "")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return BuildError(f"{what}: {error.strerror or error}. Make room or write elsewhere")
    said = redacted(_first_line(str(error))) or type(error).__name__
    if isinstance(error, ValueError):
        return HubError(f"{what}: {said}")
    return HubUnavailable(f"{what}: the connection failed ({said}). {_AGAIN}")


def redacted(text: str) -> str:
    """Returns `text` without tokens, neither this user's nor anything that looks like a token, and without queries of
    URLs.
    """
    for token in _tokens():
        text = text.replace(token, "…")
    return _QUERY.sub(r"\1?…", _TOKEN.sub("…", text))


def _of_status(what: str, repo: str, status: int, said: str) -> HubError:
    token = bool(_tokens())
    if status in _BUSY or status >= 500:
        why = "too many requests" if status == 429 else "the Hub has trouble"
        return HubUnavailable(f"{what}: {why} (status {status}). {_AGAIN}", status=status)
    if status in (401, 404):
        private = "the token that was given may not see it" if token else "it is private and no token was given"
        reason = f"it is not there, or {private}"
        hint = f"Check the name {repo}, and {_LOG_IN} of an account that may see it"
    elif status == 403:
        reason = "the token that was given lacks the right" if token else "no token was given"
        hint = f"Make one with the right (to write, for a push) at {_SETTINGS}, and {_LOG_IN}"
    elif status in (409, 412):
        reason = "it was changed by someone else meanwhile"
        hint = "Look at its present files, and try again"
    else:
        reason = f"the Hub refuses it: {redacted(_first_line(said)) or 'it does not say why'}"
        hint = "Mend that, and try again"
    return HubError(f"{what}: {reason} (status {status}). {hint}", status=status)


def _decisive(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """Returns the error, or the cause behind it, that tells what happened: the library wraps some of its own."""
    current: BaseException | None = error
    for _ in range(8):
        if current is None or isinstance(current, kinds):
            return current
        current = current.__cause__
    return None


def _tokens() -> list[str]:
    """Returns the tokens that huggingface_hub may have used, without the requests of its own look-up."""
    found = [os.environ.get(name, "") for name in _VARIABLES]
    with suppress(ImportError, OSError, ValueError):
        from huggingface_hub import constants

        found.append(Path(constants.HF_TOKEN_PATH).read_text())
    return sorted({token.strip() for token in found if len(token.strip()) >= 4}, key=len, reverse=True)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]
