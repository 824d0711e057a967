"""The commands that change the targets of a bundle. They need neither its source nor diffusers."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from diffkiln.cli.group import FILE, FORCE, JSON
from diffkiln.cli.printing import Watch, print_built

_OUTPUT = click.option("-o", "--output", type=FILE, help="Directory to make (default: BUNDLE is replaced).")


def complete_target(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Returns the names of targets that begin with what was typed, for the shell."""
    from diffkiln.spec import TARGETS

    return [CompletionItem(name) for name in TARGETS if name.startswith(begun)]


@click.command("add-target")
@click.argument("bundle", type=FILE)
@click.argument("target", shell_complete=complete_target)
@_OUTPUT
@FORCE
@JSON
def add_target_(bundle: Path, target: str, output: Path | None, force: bool, as_json: bool) -> None:
    """Add engines for TARGET to BUNDLE.

    `diffkiln targets` lists the names. The engines are built as those of the bundle's first target were; its weights
    stay the same files.
    """
    add_to(bundle, target, output, force, as_json)


def add_to(bundle: Path, target: str, output: Path | None, force: bool, as_json: bool) -> None:
    """Runs `add_target` with progress, and prints the result."""
    from diffkiln.compiler.retarget import add_target

    with Watch() as watch:
        built = add_target(bundle, target, output, force=force, progress=watch)
    print_built(built, as_json)


@click.command("strip")
@click.argument("bundle", type=FILE)
@click.option("--target", "names", multiple=True, required=True, help="Target whose engines to remove; repeatable.")
@_OUTPUT
@FORCE
@JSON
def strip_(bundle: Path, names: tuple[str, ...], output: Path | None, force: bool, as_json: bool) -> None:
    """Remove engines for targets from BUNDLE.

    At least one target stays. The weights stay the same files.
    """
    from diffkiln.compiler.retarget import strip

    with Watch() as watch:
        built = strip(bundle, names, output, force=force, progress=watch)
    print_built(built, as_json)


@click.command("retune")
@click.argument("bundle", type=FILE)
@_OUTPUT
@FORCE
@JSON
def retune_(bundle: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Rebuild engines, tuned on this GPU.

    Engines for a GPU that was absent when BUNDLE was compiled are untuned. This command builds them again on the GPU
    itself, where each kernel's variants are timed.
    """
    from diffkiln.compiler.retarget import retune

    with Watch() as watch:
        built = retune(bundle, output, force=force, progress=watch)
    print_built(built, as_json)
