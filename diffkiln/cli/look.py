"""The commands that only show something: `inspect`, `passes`, `targets` and `schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from diffkiln.cli.group import FILE, JSON, needs_compiler
from diffkiln.cli.printing import (
    choice_here,
    giga,
    print_json,
    print_pass,
    print_program,
    print_schedules,
    print_table,
    schedules,
    schedules_json,
    show,
    word,
)
from diffkiln.cli.printing_bundle import print_choice, print_manifest
from diffkiln.plugins import plugins


@click.command("inspect")
@click.argument("bundle", type=FILE)
@click.option("--program", "name", help="Print the program of this variant or component.")
@click.option("--bom", "as_bom", is_flag=True, help="Print a CycloneDX ML-BOM: sources, licences, digests.")
@JSON
def inspect_(bundle: Path, name: str | None, as_bom: bool, as_json: bool) -> None:
    """Show what BUNDLE holds and needs.

    Lists its variants, passes, weights and engines, and says which target's engines this machine would use and why.
    """
    from diffkiln.bundle import open_bundle

    with open_bundle(bundle) as opened:
        if as_bom:
            from diffkiln.bundle.bom import bom

            with opened.verify(roles={"doc"}) as verified:
                print_json(bom(verified))
        elif name is not None:
            with opened.verify(roles={"program"}) as verified:
                print_program(verified, name, as_json)
        else:
            _print_bundle(opened, as_json)


def _print_bundle(opened: Any, as_json: bool) -> None:
    found = schedules(opened)
    choice = choice_here(opened)
    if as_json:
        data = {"id": opened.id, **opened.manifest.model_dump(mode="json"), "schedules": schedules_json(found)}
        if ledger := opened.build.get("ledger"):  # outside the id, as a stranger may have written it
            data["ledger"] = ledger
        print_json({**data, **choice})
        return
    print_manifest(opened)
    print_choice(choice)
    print_schedules(found)


def _complete_pass(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in plugins("passes") if name.startswith(begun)]


@click.command("passes")
@click.argument("names", nargs=-1, metavar="[PASS]...", shell_complete=_complete_pass)
@JSON
def passes_(names: tuple[str, ...], as_json: bool) -> None:
    """List the passes and their options.

    The order is the one in which a spec may list the passes of one component. Name passes to see those alone.
    """
    needs_compiler()
    from diffkiln.passes.registry import option_models
    from diffkiln.spec import options_schema, suggest

    models = option_models()
    for name in names:
        if name not in models:
            hint = suggest(name, models) or f"There are {', '.join(models)}."
            raise click.BadParameter(f"there is no pass {name!r}. {hint}", param_hint="PASS")
    shown = {name: model for name, model in models.items() if name in names or not names}
    if as_json:
        print_json({name: options_schema(model) for name, model in shown.items()})
        return
    if not names:
        show("A spec lists the passes of one component in this order.\n")
    for name, model in shown.items():
        print_pass(name, model)


@click.command("targets")
@JSON
def targets_(as_json: bool) -> None:
    """List the named GPUs and CPUs.

    GB is the memory of a GPU, GB/s its bandwidth, and link GB/s the bandwidth from the host in one direction.
    """
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
    titles = ("name", "sm", "architecture", "GB", "GB/s", "link GB/s")
    print_table(titles, [[word(row[column]) for column in columns] for row in rows])


@click.command("schema")
def schema_() -> None:
    """Print the JSON Schema of a spec.

    Save it beside a spec and name it in "$schema": an editor then completes and checks the spec.
    """
    needs_compiler()
    from diffkiln.passes.registry import option_models
    from diffkiln.spec import json_schema

    print_json(json_schema(option_models()))
