"""What the commands share: their groups in `diffkiln --help`, and options that several take."""

from __future__ import annotations

from pathlib import Path

import click

from diffkiln.errors import MissingDependency

#: The commands of `diffkiln --help` by their group, in the order in which a user needs them.
SECTIONS = {
    "Build": ("init", "check", "compile", "add-target", "strip", "retune", "passes", "targets", "schema"),
    "Run": ("run", "serve", "inspect", "memory", "lora"),
    "Measure": ("bench", "evaluate", "tune"),
    "Share": ("push", "pull"),
    "Trust": ("verify", "sign", "clean"),
}

FILE = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for another program.")
FORCE = click.option("--force", is_flag=True, help="Replace a bundle that is at the output.")


class Sections(click.Group):
    """A group of commands that lists them in sections."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one table for each section, all with the same first column."""
        listed = {name for names in SECTIONS.values() for name in names}
        others = tuple(name for name in self.list_commands(ctx) if name not in listed)
        width = max(map(len, self.commands))
        for title, names in (SECTIONS | {"Other": others}).items():
            rows = [(name.ljust(width), self.commands[name].get_short_help_str()) for name in names]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def needs_compiler() -> None:
    """Checks that the packages of the compiler are installed.

    Raises:
        MissingDependency: only the runtime is.
    """
    from importlib.util import find_spec

    missing = [name for name in ("diffusers", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"This command needs {', '.join(missing)}, which the plain install leaves out. Install the compiler: "
            "pip install 'diffkiln[compile]'"
        )
