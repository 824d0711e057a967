"""Bundles that `load` fetched: `bundles/<owner>/<name>/<commit>` in the cache directory, each fetched once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from diffkiln.bundle import Manifest, open_bundle
from diffkiln.bundle.output import checked_output, lock_output
from diffkiln.bundle.state import cache_root
from diffkiln.errors import BuildError, Incompatible
from diffkiln.gate import gated
from diffkiln.hub.address import parse_address
from diffkiln.hub.fetch import Choose, pull_locked


@gated("choose")
def cached(address: str, choose: Choose) -> Path:
    """The directory of the bundle at `hf://owner/name@commit`, fetched if it is not here yet.

    Without any request where it is: a commit never changes. Processes that want the same one wait for the first.

    Raises what `parse_address` and `pull` raise.
    """
    repo, commit = parse_address(address)
    place = cache_root() / "bundles" / repo / commit
    if _serves(place, choose):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BuildError(f"the cache {place.parent} cannot be made: {error.strerror}. Set XDG_CACHE_HOME") from error
    place = checked_output(place)
    with lock_output(place, wait=True):
        if not _serves(place, choose):
            here = _targets(place)
            pull_locked(repo, place, commit, lambda manifest: {*here, *choose(manifest)}, force=True)
    return place


def _serves(place: Path, choose: Choose) -> bool:
    """Whether the bundle is here, with the engines that are wanted; a cache can be shared by unlike machines."""
    if not place.is_dir():
        return False
    with open_bundle(place) as bundle:
        return bundle.whole or set(_wanted(bundle.manifest, choose)) <= set(bundle.targets)


def _targets(place: Path) -> tuple[str, ...]:
    if not place.is_dir():
        return ()
    with open_bundle(place) as bundle:
        return bundle.targets


def _wanted(manifest: Manifest, choose: Choose) -> Collection[str]:
    try:
        return choose(manifest)
    except Incompatible:
        return ()  # fetching more would not help; loading says what does not fit
