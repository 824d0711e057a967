"""Fetching a bundle: one commit, only the engines that are wanted, verified before it takes its place.

Files go to a staging directory beside the output, which stays after a failure; the next pull goes on from there. The
manifest decides which names are asked for and how large they may be. When all is there and hashed the directory is
synced and renamed: the output is the whole bundle or is not there.

A pulled bundle gets no receipt: its native code is loaded only where the user allows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffkiln.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    PARTIAL,
    SIGNATURE,
    UNHASHED,
    FileEntry,
    Manifest,
    Progress,
    bundle_id,
    dump_partial,
    engine_targets,
    left_out,
    open_bundle,
    parse_manifest,
)
from diffkiln.bundle.manifest import MAX_MANIFEST_BYTES
from diffkiln.bundle.output import check_replaceable, checked_output, lock_output
from diffkiln.bundle.reader import digest_line
from diffkiln.bundle.staging import Staging, explained, free_bytes, sync_tree, walk
from diffkiln.errors import BuildError, DigestMismatch, HubError
from diffkiln.guards.gate import gated
from diffkiln.hub.address import check_repo
from diffkiln.hub.download import Download
from diffkiln.hub.remote import client, look_at

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Which of the bundle's targets to fetch the engines of.
Choose = Callable[[Manifest], Collection[str]]

_MAX_UNHASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Pulled:
    """A bundle that was fetched: where it lies, its id, the commit, and the targets whose engines came with it."""

    path: Path
    id: str
    repo: str
    commit: str
    targets: tuple[str, ...]


def only(names: Sequence[str]) -> Choose:
    """Returns a choice of targets by name. Calling it raises `HubError` for a target without engines in the bundle."""

    def choose(manifest: Manifest) -> Collection[str]:
        known = engine_targets(manifest)
        if unknown := [name for name in names if name not in known]:
            raise HubError(
                f"the bundle has no engines for {', '.join(map(repr, unknown))}. It has them for "
                f"{', '.join(known) or 'no target: leave --target away'}"
            )
        return names

    return choose


@gated("choose", "progress")
def pull(
    repo: str,
    output: str | os.PathLike[str],
    *,
    revision: str = "main",
    choose: Choose = engine_targets,
    force: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Fetches a bundle from the Hub into the directory `output`.

    Args:
        repo: owner/name.
        output: a path that is not there yet; with `force`, or a bundle that is then replaced.
        revision: a branch, a tag or a commit; looked up once, and everything is fetched from that commit.
        choose: the targets whose engines are fetched; all by default. What else the bundle holds always is.
        progress: called with the number of bytes received since its last call.

    Raises:
        HubError: it is not there, may not be read, or is not a bundle; `HubUnavailable` for what may pass.
        IntegrityError: what the repository holds, or sends, is not what its manifest says.
        Incompatible: the bundle is of a later format, or `choose` finds no target that fits.
        SpecError, BuildError: the output cannot be written.
    """
    directory = checked_output(output)
    with lock_output(directory):
        check_replaceable(directory, force)
        return pull_locked(check_repo(repo), directory, revision, choose, force, progress)


def pull_locked(
    repo: str, directory: Path, revision: str, choose: Choose, force: bool = False, progress: Progress | None = None
) -> Pulled:
    """Fetches a bundle as `pull` does, for a caller that holds the lock of `place`, an absolute path."""
    api = client()
    staging = Staging(directory, resumed=True)
    staging.create()
    try:
        pulled = _fill(api, repo, staging.root, revision, choose, progress)
        with explained(staging.root, "sync"):
            sync_tree(staging.root)
        check_replaceable(directory, force)
        staging.install()
    except BaseException:
        staging.close()
        raise
    staging.remove()
    return Pulled(directory, *pulled)


def _fill(
    api: HfApi, repo: str, root: Path, revision: str, choose: Choose, progress: Progress | None
) -> tuple[str, str, str, tuple[str, ...]]:
    """Fetches everything into `root`, which then is the bundle. Returns id, repository, commit and targets."""
    remote = look_at(api, repo, revision)
    download = Download(api, remote, root, progress)
    data = _manifest(download)
    manifest = parse_manifest(data)
    wanted = choose(manifest)
    targets = tuple(name for name in engine_targets(manifest) if name in wanted)
    absent = left_out(manifest, targets)
    rows = [row for row in manifest.files if row.path not in absent]
    download.check_listed(rows)
    _require_space(root, rows)
    download.all(rows)
    notes = [name for name in sorted(UNHASHED | {SIGNATURE}) if _is_small(download, name)]
    for name in notes:
        download.small(name, _MAX_UNHASHED_BYTES)
    download.drop_notes()
    with explained(root, "write to"):
        _keep(root, {row.path for row in rows} | {MANIFEST, MANIFEST_DIGEST, *notes})
        if absent:
            (root / PARTIAL).write_bytes(dump_partial(targets))
    # Every file was hashed when it came; this looks at the directory as a reader will.
    with open_bundle(root, expect_id=bundle_id(data)) as bundle:
        bundle.verify(roles=()).close()
    return bundle_id(data), repo, remote.commit, targets


def _manifest(download: Download) -> bytes:
    """Returns the manifest, once it agrees with its digest."""
    data = download.small(MANIFEST, MAX_MANIFEST_BYTES)
    if download.small(MANIFEST_DIGEST, 1024) != digest_line(data):
        download.forget(MANIFEST)
        download.forget(MANIFEST_DIGEST)
        raise DigestMismatch(
            f"{download.remote.repo} at {download.remote.commit[:12]}: {MANIFEST} is not the one that "
            f"{MANIFEST_DIGEST} names. Pull again; if that does not help, push the bundle again"
        )
    return data


def _is_small(download: Download, name: str) -> bool:
    listed = download.remote.files.get(name)
    return listed is not None and listed.size <= _MAX_UNHASHED_BYTES


def _require_space(root: Path, rows: Sequence[FileEntry]) -> None:
    """Raises `BuildError` now if the remaining files do not fit."""
    there = sum(row.size for row in rows if (root / row.path).is_file())
    needed, free = sum(row.size for row in rows) - there, free_bytes(root)
    if free < needed:
        raise BuildError(
            f"{needed} bytes are needed in {root.parent} and {free} are free. Make room or write elsewhere"
        )


def _keep(root: Path, names: Collection[str]) -> None:
    """Removes files that an earlier run, of another commit or for other targets, left."""
    for directory, files in walk(root):
        for file in files:
            if file.relative_to(root).as_posix() not in names:
                file.unlink()
        if directory != root and not os.listdir(directory):
            directory.rmdir()
