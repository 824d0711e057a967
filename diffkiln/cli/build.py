"""The commands that make a bundle: `init`, `check` and `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from diffkiln.cli.group import FILE, FORCE, JSON, needs_compiler
from diffkiln.cli.printing import Watch, plan_json, print_built, print_json, print_plan, say, show
from diffkiln.cli.printing_bundle import print_next
from diffkiln.cli.targets import add_to
from diffkiln.errors import DiffkilnError


@click.command("init")
@click.argument("model")
@click.option("-o", "--output", type=FILE, required=True, help="Spec file to write.")
@click.option("--target", "names", multiple=True, help="GPU or CPU to build for (default: this machine); repeatable.")
@click.option("--pipeline", metavar="CLASS", help="Pipeline class to use instead of the model's own.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit on the Hub.")
@click.option("--height", type=click.IntRange(min=1), help="Height in pixels (default: the model's own).")
@click.option("--width", type=click.IntRange(min=1), help="Width in pixels (default: the model's own).")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps (default: the pipeline's own).")
@click.option("--frames", type=click.IntRange(min=1), help="Frames of a video (default: the pipeline's own).")
@click.option("--force", is_flag=True, help="Replace a file that is at the output.")
def init_(
    model: str,
    output: Path,
    names: tuple[str, ...],
    pipeline: str | None,
    revision: str,
    height: int | None,
    width: int | None,
    steps: int | None,
    frames: int | None,
    force: bool,
) -> None:
    """Write a first spec for MODEL.

    MODEL is a folder that `save_pretrained` wrote, or a repository on the Hub. Only configuration is read. The spec
    names the sizes and the passes that suit the model, and can be checked, edited and compiled.
    """
    needs_compiler()
    from diffkiln.compiler.first_spec import Wishes, first_spec, write_spec

    wishes = Wishes(pipeline=pipeline, height=height, width=width, steps=steps, frames=frames, targets=names)
    written = first_spec(model, output, revision, wishes)
    write_spec(written.spec, output, force=force)
    for notice in written.notices:
        say(f"note: {notice}")
    show(str(output))
    say(f"next: diffkiln check {output}")


@click.command("check")
@click.argument("spec", type=FILE)
@JSON
def check_(spec: Path, as_json: bool) -> None:
    """Check SPEC; nothing is built.

    Reads the model's configuration alone, and no weights. Reports every problem at once, each with its place in the
    spec, the reason and what to write instead. Takes seconds; a model on the Hub is downloaded first. Of a spec for
    several processes the call is recorded, too, and says what they send each other in a step, and the least time of
    a call on one GPU and on several.
    """
    needs_compiler()
    from diffkiln.compiler.check import check
    from diffkiln.compiler.compile import shared_calls_of

    try:
        checked = check(spec)
        shared = shared_calls_of(spec) if checked.spec.parallel else None
    except DiffkilnError as error:
        if not as_json:
            raise
        problems = [{"where": p.where, "reason": p.reason, "mend": p.hint} for p in error.problems]
        print_json({"ok": False, "error": type(error).__name__, "message": str(error), "problems": problems})
        raise SystemExit(error.exit_code) from None
    if as_json:
        print_json({"ok": True, **plan_json(checked, shared)})
    else:
        print_plan(checked, shared)
        if checked.spec.runtime.offload is not None:
            say(f"the memory of its calls, and their least time: diffkiln memory {spec}")
        say(f"next: diffkiln compile {spec} -o bundle")


@click.command("compile")
@click.argument("spec", type=FILE)
@click.option("-o", "--output", type=FILE, help="Directory of the bundle to make.  [required]")
@click.option("--add-target", "target", hidden=True)
@click.option(
    "--ledger",
    type=click.Choice(("cumulative", "each")),
    default="cumulative",
    show_default=True,
    help="With quality gates: evaluate the passes one more each time, or each alone too.",
)
@FORCE
@JSON
def compile_(
    spec: Path,
    output: Path | None,
    target: str | None,
    ledger: Literal["cumulative", "each"],
    force: bool,
    as_json: bool,
) -> None:
    """Compile SPEC into a bundle.

    The bundle appears at the output when it is complete, and not before. The digits example takes about a minute, and
    FLUX.1-dev at full size took 18 minutes on two CPU cores.
    """
    if target is not None:
        add_to(spec, target, output, force, as_json)
        return
    if output is None:
        raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
    needs_compiler()
    from diffkiln.compiler.compile import compile as build

    with Watch() as watch:
        built = build(spec, output, force=force, progress=watch, ledger=ledger)
    print_built(built, as_json)
    if not as_json:
        print_next(output)
