"""Bundles that `load` fetched: `bundles/<owner>/<name>/<commit>` in the cache directory, each fetched once.

Where a bundle lies does not show where it comes from. So its id is noted in the user's state directory when it was
fetched, and one without a note is compared with what the Hub has at that commit.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from diffkiln.bundle import MANIFEST, Bundle, Manifest, open_bundle
from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.notes import read_note, write_note
from diffkiln.bundle.output import checked_output, lock_output
from diffkiln.bundle.state import cache_home
from diffkiln.errors import HubUnavailable, Incompatible, IntegrityError
from diffkiln.guards.gate import gated
from diffkiln.guards.printable import get_logger
from diffkiln.hub.address import COMMIT, SCHEME, check_repo, parse_address
from diffkiln.hub.fetch import Choose, pull_locked
from diffkiln.hub.remote import client, look_at

log = get_logger(__name__)


@gated()
def pinned(address: str) -> str:
    """Returns `hf://owner/name@commit` for an address with a branch, a tag or a commit; without any, for `main`.

    Raises:
        HubError: it is not such an address, or the Hub has no such revision. `HubUnavailable` for what may pass.
    """
    repo, _, revision = address.removeprefix(SCHEME).partition("@")
    check_repo(repo)
    commit = revision if COMMIT.fullmatch(revision) else look_at(client(), repo, revision or "main").commit
    return f"{SCHEME}{repo}@{commit}"


@gated("choose")
def cached(address: str, choose: Choose) -> Path:
    """Returns the directory of the bundle at `hf://owner/name@commit`, and fetches the bundle if it is not there yet.

    A bundle that this user fetched needs no request: a commit never changes. Processes that want the same bundle wait
    for the first.

    Raises what `parse_address` and `pull` raise, and `IntegrityError` for a cache that others can write to.
    """
    repo, commit = parse_address(address)
    directory = cache_home().directory("bundles") / repo / commit
    if _serves(repo, directory, choose):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory = checked_output(directory)
    with lock_output(directory, wait=True):
        if not _serves(repo, directory, choose):
            here = _targets(directory)
            pulled = pull_locked(repo, directory, commit, lambda manifest: {*here, *choose(manifest)}, force=True)
            _note(repo, commit, pulled.id)
    return directory


def _serves(repo: str, directory: Path, choose: Choose) -> bool:
    """Returns True if the bundle is here, with the engines that are wanted; unlike machines may share a cache."""
    if not directory.is_dir():
        return False
    with open_bundle(directory) as bundle:
        if not bundle.whole and not set(_wanted(bundle.manifest, choose)) <= set(bundle.targets):
            return False
        if _is_the_hubs(repo, directory.name, bundle):
            return True
    log.warning("%s differs from the Hub's bundle, and is fetched again", directory)
    return False


def _is_the_hubs(repo: str, commit: str, bundle: Bundle) -> bool:
    """Returns True if this user fetched the bundle, or the Hub has its manifest, which names every other byte.

    Raises:
        HubUnavailable: there is no note, and the Hub cannot be asked.
    """
    noted = _noted(repo, commit)
    if noted is not None:
        return noted == bundle.id
    try:
        remote = look_at(client(), repo, commit)
    except HubUnavailable as error:
        raise HubUnavailable(
            f"{bundle.path} is in the cache, but nothing shows that you fetched it, and the Hub cannot be asked: "
            f"{error}. Load it once with the Hub in reach, or by its path"
        ) from error
    listed = remote.files.get(MANIFEST)
    data = (bundle.path / MANIFEST).read_bytes()
    if listed is None or sha256_bytes(data) != bundle.id or not listed.holds(data):
        return False
    _note(repo, commit, bundle.id)
    return True


def _noted(repo: str, commit: str) -> str | None:
    """Returns the id that this user's bundle of a commit had when it was fetched."""
    try:
        note = json.loads(read_note("fetched", _name(repo, commit)) or b"null")
    except ValueError:
        return None
    return note.get("id") if isinstance(note, dict) and note.get("address") == _address(repo, commit) else None


def _note(repo: str, commit: str, identity: str) -> None:
    write_note("fetched", _name(repo, commit), json.dumps({"address": _address(repo, commit), "id": identity}).encode())


def _name(repo: str, commit: str) -> str:
    return f"{sha256_bytes(_address(repo, commit).encode())}.json"


def _address(repo: str, commit: str) -> str:
    return f"{repo}@{commit}"


def _targets(directory: Path) -> tuple[str, ...]:
    """Returns the targets whose engines are here; none for an unreadable bundle, which is replaced."""
    if not directory.is_dir():
        return ()
    try:
        with open_bundle(directory) as bundle:
            return bundle.targets
    except IntegrityError:
        return ()


def _wanted(manifest: Manifest, choose: Choose) -> Collection[str]:
    try:
        return choose(manifest)
    except Incompatible:
        return ()  # fetching more would not help; loading says what does not fit
