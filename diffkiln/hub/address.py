"""Names of repositories, and the addresses that `load` takes: hf://owner/name@commit."""

from __future__ import annotations

import re

from diffkiln.errors import HubError

SCHEME = "hf://"
COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")


def check_repo(repo: str) -> str:
    """Returns the name of a repository, safe to use as two directories. Raises `HubError` for an impossible name."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise HubError(f"{repo[:200]!r} is not the name of a repository on the Hub. Give owner/name")
    return repo


def parse_address(address: str) -> tuple[str, str]:
    """Splits `hf://owner/name@commit` into repository and commit.

    Raises:
        HubError: it is not such an address, or names a branch or a tag, which can mean another bundle tomorrow.
    """
    repo, at, revision = address.removeprefix(SCHEME).partition("@")
    check_repo(repo)
    if COMMIT.fullmatch(revision):
        return repo, revision
    found = f"names {revision[:100]!r}, which can come to mean another bundle" if at else "names no commit"
    raise HubError(
        f"{address[:300]} {found}. Give {SCHEME}{repo}@ and the commit, 40 hexadecimal digits from "
        f"https://huggingface.co/{repo}/commits/main, or fetch a branch or tag with `diffkiln pull`"
    )
