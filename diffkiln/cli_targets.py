"""The commands that change the targets of a bundle that is there. They need neither its source nor diffusers."""

from __future__ import annotations

from pathlib import Path

import click

from diffkiln.printing import Watch, print_built

_OUTPUT = click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Directory to make; by default BUNDLE is replaced."
)
_FORCE = click.option("--force", is_flag=True, help="Replace a bundle that is at the output.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")


@click.command("strip")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "names", multiple=True, required=True, help="Whose engines to remove; may be given again.")
@_OUTPUT
@_FORCE
@_JSON
def strip_(bundle: Path, names: tuple[str, ...], output: Path | None, force: bool, as_json: bool) -> None:
    """Remove the engines for some targets from BUNDLE. Its weights are not touched."""
    from diffkiln.retarget import strip

    with Watch() as watch:
        built = strip(bundle, names, output, force=force, progress=watch)
    print_built(built, as_json)


@click.command("retune")
@click.argument("bundle", type=click.Path(path_type=Path))
@_OUTPUT
@_FORCE
@_JSON
def retune_(bundle: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Build BUNDLE's engines for this machine's GPU anew, so that they are tuned on it."""
    from diffkiln.retarget import retune

    with Watch() as watch:
        built = retune(bundle, output, force=force, progress=watch)
    print_built(built, as_json)
