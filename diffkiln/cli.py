"""The command line: arguments and printing. What it does is done elsewhere.

Exit codes: 0 ok · 2 bad spec, usage or source · 3 illegal plan · 4 build failed · 5 incompatible machine ·
6 integrity or trust refused · 70 internal fault · 130 interrupted.
Results go to the standard output, everything else to standard error.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import click

from diffkiln.cli_clean import clean_
from diffkiln.cli_hub import pull_, push_
from diffkiln.cli_run import run_
from diffkiln.cli_targets import retune_, strip_
from diffkiln.cli_trust import sign, verify
from diffkiln.errors import DiffkilnError
from diffkiln.gate import ours
from diffkiln.printing import (
    Watch,
    checked_json,
    choice_here,
    giga,
    print_built,
    print_checked,
    print_choice,
    print_json,
    print_manifest,
    print_pass,
    print_program,
    print_schedules,
    print_table,
    say,
    schedules,
    schedules_json,
    show,
    word,
)

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="diffkiln", prog_name="diffkiln")
def cli() -> None:
    """Compile diffusers pipelines into self-contained bundles, and run them on torch alone."""


@cli.command("compile")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory of the bundle to make.")
@click.option("--add-target", "target", help="Give a bundle instead of SPEC; build its engines for this target, too.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@_JSON
def compile_(spec: Path, output: Path | None, target: str | None, force: bool, as_json: bool) -> None:
    """Compile SPEC into a bundle. With --add-target, SPEC is a bundle, which is replaced where no output is given."""
    if target is not None:
        from diffkiln.retarget import add_target

        with Watch() as watch:
            built = add_target(spec, target, output, force=force, progress=watch)
        print_built(built, as_json)
        return
    if output is None:
        raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
    _needs_compiler()
    from diffkiln.compiler import compile as build

    with Watch() as watch:
        built = build(spec, output, force=force, progress=watch)
    print_built(built, as_json)


@cli.command("check")
@click.argument("spec", type=click.Path(path_type=Path))
@_JSON
def check_(spec: Path, as_json: bool) -> None:
    """Check SPEC from configuration alone: nothing is built and no weight is read."""
    _needs_compiler()
    from diffkiln.compiler import check

    try:
        checked = check(spec)
    except DiffkilnError as error:
        if not as_json:
            raise
        problems = [{"where": p.where, "reason": p.reason, "mend": p.mend} for p in error.problems]
        print_json({"ok": False, "error": type(error).__name__, "message": str(error), "problems": problems})
        raise SystemExit(error.exit_code) from None
    if as_json:
        print_json({"ok": True, **checked_json(checked)})
    else:
        print_checked(checked)


@cli.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--program", "name", help="Print the program of a variant or of a component as a listing.")
@click.option("--bom", "as_bom", is_flag=True, help="Print a CycloneDX ML-BOM: sources, licences, digests.")
@_JSON
def inspect_(bundle: Path, name: str | None, as_bom: bool, as_json: bool) -> None:
    """Show what a bundle holds."""
    from diffkiln.bundle import open_bundle

    with open_bundle(bundle) as opened:
        if as_bom:
            from diffkiln.bom import bom

            with opened.verify(roles={"doc"}) as verified:
                print_json(bom(verified))
            return
        if name is not None:
            with opened.verify(roles={"program"}) as verified:
                print_program(verified, name, as_json)
            return
        found = schedules(opened)
        choice = choice_here(opened)
        if as_json:
            print_json(
                {
                    "id": opened.id,
                    **opened.manifest.model_dump(mode="json"),
                    "schedules": schedules_json(found),
                    **choice,
                }
            )
        else:
            print_manifest(opened.id, opened.manifest)
            if not opened.whole:
                show(f"partial   the engines for {', '.join(opened.targets) or 'no target'} alone are here")
            print_choice(choice)
            print_schedules(found)


cli.add_command(verify)
cli.add_command(sign)


cli.add_command(run_)


@cli.command("passes")
@_JSON
def passes_(as_json: bool) -> None:
    """List the passes: options, defaults, what they cannot follow, examples."""
    _needs_compiler()
    from diffkiln.passes.registry import option_models

    models = option_models()
    if as_json:
        print_json({name: model.model_json_schema() for name, model in models.items()})
        return
    show("The passes, in the order in which a spec may list those of one component.\n")
    for name, model in models.items():
        print_pass(name, model)


@cli.command("targets")
@_JSON
def targets_(as_json: bool) -> None:
    """List the targets that have a name."""
    from diffkiln.spec import TARGETS

    rows = [
        {
            "name": name,
            "device": target.device,
            "sm": target.sm,
            "isa": target.isa,
            "architecture": target.architecture,
            "memory_gb": giga(target.memory_bytes),
            "memory_gb_per_s": giga(target.memory_bandwidth),
            "h2d_gb_per_s": giga(target.h2d_bandwidth),
        }
        for name, target in TARGETS.items()
    ]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "sm", "architecture", "memory_gb", "memory_gb_per_s", "h2d_gb_per_s")
    print_table(columns, [[word(row[column]) for column in columns] for row in rows])


@cli.command("schema")
def schema_() -> None:
    """Print the JSON Schema of a spec, for editors."""
    _needs_compiler()
    from diffkiln.passes.registry import option_models
    from diffkiln.spec import json_schema

    print_json(json_schema(option_models()))


cli.add_command(strip_)
cli.add_command(retune_)
cli.add_command(push_)
cli.add_command(pull_)
cli.add_command(clean_)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. Setting DIFFKILN_DEBUG lets exceptions through with their traceback.
    """
    try:
        result = cli.main(args=arguments, prog_name="diffkiln", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(file=usage)
        say(usage.getvalue().rstrip())
        return 2
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; the output is as it was before")
        return 130
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DiffkilnError as error:
        if os.environ.get("DIFFKILN_DEBUG"):
            raise
        say(f"error: {error}")
        return error.exit_code
    except BaseException as error:  # of native extensions, too, which are no Exception
        if os.environ.get("DIFFKILN_DEBUG"):
            raise
        told = ours(error, "diffkiln")
        say(f"error: {told}")
        return told.exit_code


def _needs_compiler() -> None:
    """Say what to install, where only the runtime is."""
    from importlib.util import find_spec

    missing = [name for name in ("diffusers", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        from diffkiln.errors import MissingDependency

        raise MissingDependency(f"compiling needs {', '.join(missing)}: pip install 'diffkiln[compile]'")


__all__ = ["cli", "main"]
