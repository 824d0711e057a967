"""The command that frees caches and what killed processes left."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from diffkiln.cli.printing import print_json, print_table, say, show, size_of

if TYPE_CHECKING:
    from diffkiln.bundle.cleaning import Freeable

#: Those of `diffkiln.bundle.cleaning`, which is imported when the command runs: `--help` is to be quick.
KINDS = {
    "engines": "those of earlier builds, rebuilt when a spec needs them",
    "toolchain": "compiled headers that builds of engines share",
    "bundles": "those that load or run fetched from the Hub",
    "architectures": "configurations of architectures with random weights",
    "recovered": "what recover has trained, or is training",
    "kernels": "those that TensorRT compiled for this GPU",
    "weights": "copies that processes share (share_weights)",
    "leftovers": "temporary folders, unfinished downloads and unused locks of killed processes",
}


@click.command("clean", epilog="Kinds: " + "; ".join(f"{kind}, {what}" for kind, what in KINDS.items()) + ".")
@click.option(
    "--only", "kinds", multiple=True, type=click.Choice(list(KINDS)), metavar="KIND", help="A kind; may be given again."
)
@click.option("-y", "--yes", is_flag=True, help="Remove without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")
def clean_(kinds: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Show and free caches and leftovers."""
    from diffkiln.bundle.cleaning import free, freeable

    items = freeable(kinds or tuple(KINDS))
    if not as_json:
        _show(items)
    stays: dict[str, str] = {}
    if items and (yes or (not as_json and _asked(items))):
        stays = {str(item.path): reason for item in items if (reason := free(item))}
        for path, reason in stays.items():
            say(f"{path} stays: {reason}")
    elif items and not as_json:
        say("nothing was removed")
    if as_json:
        rows = [{"kind": item.kind, "path": str(item.path), "bytes": item.bytes} for item in items]
        print_json({"items": rows, "removed": yes, "stays": stays})


def _show(items: list[Freeable]) -> None:
    if not items:
        show("there is nothing to free")
        return
    print_table(("kind", "size", "place"), [[item.kind, size_of(item.bytes), str(item.path)] for item in items])
    show(f"{size_of(sum(item.bytes for item in items))} in all")


def _asked(items: list[Freeable]) -> bool:
    """Returns True if the user wants everything removed. Asks nobody if there is no terminal."""
    if not sys.stdin.isatty():
        say("pass --yes to remove them")
        return False
    return click.confirm(f"Remove {len(items)} things?", err=True)
