"""Publishing a bundle: one commit that makes the repository the bundle and its model card, and nothing else.

The bundle is verified first, and what was uploaded is compared with the manifest before the commit is made. Files that
the repository has already are neither read nor sent. The commit names its parent, so that it fails where someone else
was faster, and README.md is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffkiln.bundle import MANIFEST, MANIFEST_DIGEST, SIGNATURE, Bundle, Progress, open_bundle
from diffkiln.bundle.card import MAX_BUILD_BYTES, card, read_build
from diffkiln.bundle.layout import BUILD, CARD
from diffkiln.bundle.reader import digest_line
from diffkiln.errors import DigestMismatch, HubError, Incomplete
from diffkiln.guards.gate import gated
from diffkiln.hub.address import check_repo
from diffkiln.hub.explained import asking
from diffkiln.hub.remote import Remote, RemoteFile, client, look_at
from diffkiln.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

#: What the Hub itself puts into a repository.
_THE_HUBS = frozenset({".gitattributes"})
#: Files up to this size are compared and sent as bytes; larger ones are never read whole.
_SMALL = 1 << 20


@dataclass(frozen=True)
class Pushed:
    """A bundle that was published: the commit, and the names that it added, changed or removed (none: no commit)."""

    repo: str
    commit: str
    url: str
    id: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]


@gated()
def push(
    bundle: str | os.PathLike[str], repo: str, *, private: bool = False, progress: Progress | None = None
) -> Pushed:
    """Publishes the bundle in the directory `bundle` as the repository `repo` (owner/name), which is made if necessary.

    Args:
        bundle: a whole bundle.
        repo: owner/name.
        private: make the repository private; refused for one that is public already.
        progress: called with the number of bytes hashed since its last call.

    Raises:
        IntegrityError: the bundle is not whole, or changed while it was being sent.
        HubError: the Hub does not take it; `HubUnavailable` for what may pass.
        MissingDependency: huggingface_hub is not installed.
    """
    check_repo(repo)
    with open_bundle(bundle) as opened:
        if not opened.whole:
            raise Incomplete(
                f"{opened.path} holds engines for {', '.join(opened.targets) or 'no target'} alone: others would "
                "disappear from the repository. Pull it with --all-targets, and push that"
            )
        opened.verify(progress).close()
        api = client()
        remote = _repository(api, repo, private)
        return _commit(api, opened, remote)


def _repository(api: HfApi, repo: str, private: bool) -> Remote:
    """Returns the repository; makes it if there is none."""
    try:
        remote = look_at(api, repo)
    except HubError as error:
        if error.status not in (401, 404):  # the Hub says 401 of what is not there to someone without a token
            raise
        with asking(repo, "create"):
            api.create_repo(repo, private=private or None, exist_ok=True)
        remote = look_at(api, repo)
    if private and not remote.private:
        raise HubError(
            f"{repo} is public, so it cannot take a bundle that is to stay private. Make it private in its settings, "
            "choose another name, or leave --private away"
        )
    return remote


def _commit(api: HfApi, bundle: Bundle, remote: Remote) -> Pushed:
    files = dict(_files(bundle, remote.repo))
    digests = {row.path: row.sha256 for row in bundle.manifest.files} | {MANIFEST: bundle.id}
    changed = {
        name: content
        for name, content in files.items()
        if not _is_same(content, digests.get(name), remote.files.get(name))
    }
    removed = sorted(remote.files.keys() - files.keys() - _THE_HUBS)
    sent = tuple(sorted(changed))
    commit, url = remote.commit, f"{api.endpoint}/{remote.repo}/commit/{remote.commit}"
    if changed or removed:
        with asking(remote.repo, "push to"):
            message = f"{bundle.manifest.pipeline.class_name}, compiled by diffkiln {__version__}"
            commit, url = _send(api, remote, changed, removed, digests, message, f"Bundle {bundle.id}")
    return Pushed(remote.repo, commit, url, bundle.id, sent, tuple(removed))


def _files(bundle: Bundle, repo: str) -> Iterator[tuple[str, Path | bytes]]:
    """Yields the files that the repository is to hold, by name: small files as bytes, others as paths."""
    build = bundle.path / BUILD
    notes = build.read_bytes() if build.is_file() and build.stat().st_size <= MAX_BUILD_BYTES else b""
    manifest = (bundle.path / MANIFEST).read_bytes()
    yield MANIFEST, manifest
    yield MANIFEST_DIGEST, digest_line(manifest)
    if notes:
        yield BUILD, notes
    if bundle.signature is not None:
        yield SIGNATURE, (bundle.path / SIGNATURE).read_bytes()
    yield CARD, card(bundle.manifest, read_build(notes), repo, bundle.id).encode()
    for row in bundle.manifest.files:
        path = bundle.path / row.path
        yield row.path, path.read_bytes() if row.size <= _SMALL else path


def _is_same(content: Path | bytes, sha256: str | None, remote: RemoteFile | None) -> bool:
    """Returns True if the repository has the file already. Large files are compared by digest, unread."""
    from huggingface_hub.utils.sha import git_hash

    if remote is None:
        return False
    if remote.sha256 is not None and sha256 is not None:
        return remote.sha256 == sha256
    return isinstance(content, bytes) and remote.sha256 is None and remote.git == git_hash(content)


def _send(
    api: HfApi,
    remote: Remote,
    changed: Mapping[str, Path | bytes],
    removed: list[str],
    digests: Mapping[str, str],
    message: str,
    description: str,
) -> tuple[str, str]:
    """Uploads large files, compares, and commits. Returns the commit and its address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(name, content) for name, content in sorted(changed.items())]
    api.preupload_lfs_files(remote.repo, additions, free_memory=False)
    _check_sent(digests, additions)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
    operations += [CommitOperationDelete(name, is_folder=False) for name in removed]
    info = api.create_commit(
        remote.repo,
        operations,
        commit_message=message,
        commit_description=description,
        parent_commit=remote.commit,
    )
    return info.oid, info.commit_url


def _check_sent(digests: Mapping[str, str], additions: list[CommitOperationAdd]) -> None:
    """Checks that no file was written to after it was verified."""
    for addition in additions:
        wanted = digests.get(addition.path_in_repo)
        if wanted is not None and addition.upload_info.sha256.hex() != wanted:
            raise DigestMismatch(
                f"{addition.path_in_repo!r} changed while it was being pushed, so nothing was. Build the bundle again"
            )
