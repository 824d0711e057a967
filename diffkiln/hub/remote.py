"""A repository at one commit: what is in it, how large, with which digests. One request tells all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffkiln.bundle.digest import sha256_bytes
from diffkiln.errors import HubError
from diffkiln.hub.address import COMMIT
from diffkiln.hub.explained import asking
from diffkiln.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is known of large files (LFS), `git` (git's blob id) of the others."""

    size: int
    sha256: str | None
    git: str | None

    def holds(self, data: bytes) -> bool:
        """Returns True if these are its bytes, as far as the Hub has told a digest."""
        from huggingface_hub.utils.sha import git_hash

        if self.sha256 is not None:
            return self.sha256 == sha256_bytes(data)
        return self.git is not None and self.git == git_hash(data)


@dataclass(frozen=True)
class Remote:
    """A repository at `commit`; every question that is asked later is asked of this commit."""

    repo: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]


def client() -> HfApi:
    """Returns huggingface_hub's client. Raises `MissingDependency`."""
    with asking("", "reach"):
        from huggingface_hub import HfApi

        return HfApi(library_name="diffkiln", library_version=__version__)


def look_at(api: HfApi, repo: str, revision: str | None = None) -> Remote:
    """Returns the present state of `revision` (a branch, a tag or a commit; `main` by default) of the repository.

    Raises `HubError` and `HubUnavailable`.
    """
    with asking(repo, "read"):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {
            item.rfilename: RemoteFile(item.size or 0, item.lfs.sha256 if item.lfs else None, item.blob_id)
            for item in info.siblings or ()
        }
    commit = info.sha or ""
    wanted = revision if revision and COMMIT.fullmatch(revision) else commit
    if not COMMIT.fullmatch(commit) or commit != wanted:
        raise HubError(f"cannot read {repo}: the Hub answered with the commit {commit[:40]!r} instead of {wanted!r}")
    return Remote(repo, commit, bool(info.private), files)
