"""The commands that measure and compare: `bench`, `evaluate` and `tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffkiln.cli.group import FILE, JSON, needs_compiler
from diffkiln.cli.printing import Watch, print_json, say, schedules, show
from diffkiln.cli.printing_measured import print_bench, print_evaluation, print_tuned
from diffkiln.cli.run import DEVICE, NATIVE

if TYPE_CHECKING:
    from diffkiln.evaluate.quality import Evaluation
    from diffkiln.evaluate.ways import Asked

SOURCE = click.option(
    "--source", type=FILE, help="Folder that BUNDLE was made from, where this machine does not know it."
)


@click.command("bench")
@click.argument("bundle", type=FILE)
@click.option("--against", multiple=True, metavar="WAY", help="Also measure eager, compile, a bundle or a model.")
@click.option("--prompt", help="Prompt of every call.")
@click.option("--starts", type=click.IntRange(0), default=3, show_default=True, help="Fresh processes of each way.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Calls that do not count.")
@click.option("--runs", type=click.IntRange(0), help="Calls that count (default: 5, or 10 on a GPU).")
@SOURCE
@DEVICE
@NATIVE
@JSON
def bench_(
    bundle: Path,
    against: tuple[str, ...],
    prompt: str | None,
    starts: int,
    warmup: int,
    runs: int | None,
    source: Path | None,
    device: str | None,
    allow_native: bool,
    as_json: bool,
) -> None:
    """Measure the speed and memory of BUNDLE.

    Times the start of a process to its first image, the load, a call and its phases, each way in a process of its own.
    The ways take turns, forwards and backwards. Prints the median, and the lowest and highest in brackets.

    \b
    diffkiln bench bundle
    diffkiln bench bundle --against eager --against compile --json
    """
    from diffkiln.evaluate.bench import Rounds, bench
    from diffkiln.runtime.accelerator import available

    rounds = Rounds(starts, warmup, runs if runs is not None else 10 if available() else 5)
    with Watch() as watch:
        measured = bench(
            bundle,
            against,
            prompt=prompt,
            rounds=rounds,
            source=source,
            allow_native=allow_native,
            device=device,
            progress=watch,
        )
    if as_json:
        print_json(measured.as_json())
    else:
        print_bench(measured)


@click.command("evaluate")
@click.argument("bundle", type=FILE)
@click.option("--against", required=True, metavar="WAY", help="Compare with eager, a bundle or a model.")
@click.option("--prompts", type=FILE, required=True, help="Text file with a prompt a line.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Pictures of each prompt.")
@click.option("--metric", "metrics", multiple=True, help="Metric, or package.module:function (default: all).")
@click.option("--backbone", "backbones", multiple=True, metavar="KIND=FOLDER", help="Model that a metric needs.")
@click.option("--html", type=FILE, help="File to write with a report for a browser.")
@click.option("--json", "as_json", type=FILE, help="File to write with all numbers.")
@click.option("--no-bench", is_flag=True, help="Leave speed and memory out of the report.")
@click.option("--keep", type=FILE, help="Folder for the pictures; a later run goes on from them.")
@SOURCE
@DEVICE
@NATIVE
def evaluate_(
    bundle: Path,
    against: str,
    prompts: Path,
    seeds: int,
    metrics: tuple[str, ...],
    backbones: tuple[str, ...],
    html: Path | None,
    as_json: Path | None,
    no_bench: bool,
    keep: Path | None,
    source: Path | None,
    device: str | None,
    allow_native: bool,
) -> None:
    """Compare the pictures of BUNDLE.

    Draws every prompt with BUNDLE and with the reference, from the same noise, and measures how far they are apart.
    With --html, a report of one file has the pictures, the numbers and charts, and speed and memory as bench has them.

    \b
    diffkiln evaluate bundle --against eager --prompts prompts.txt
    diffkiln evaluate bundle --against eager --prompts prompts.txt --html it.html
    """
    from diffkiln.evaluate.quality import Comparison, evaluated
    from diffkiln.evaluate.ways import Asked

    if html is not None:
        from diffkiln.evaluate.report import needs_packages

        needs_packages()
    comparison = Comparison(against, seeds, metrics, backbones)
    asked = Asked(allow_native, device, source)
    with Watch() as watch, evaluated(bundle, comparison, prompts, keep, asked, watch) as made:
        if as_json is not None:
            as_json.write_text(json.dumps(made.as_json(), indent=2) + "\n", encoding="utf-8")
        if html is not None:
            html.write_text(_report(bundle, made, None if no_bench else against, asked, watch), encoding="utf-8")
    print_evaluation(made)
    for path in filter(None, (as_json, html)):
        show(str(path))


def _report(bundle: Path, made: Evaluation, against: str | None, asked: Asked, watch: Watch) -> str:
    from diffkiln.bundle import open_bundle
    from diffkiln.evaluate.bench import Rounds, bench
    from diffkiln.evaluate.report import report

    measured = None
    if against is not None:
        rounds = Rounds(starts=1, warmup=1, runs=3)
        device, source, native = asked.device, asked.source, asked.allow_native
        measured = bench(
            bundle, [against], rounds=rounds, source=source, allow_native=native, device=device, progress=watch
        )
    with open_bundle(bundle) as opened:
        return report(made, measured, schedules(opened), opened.build)


@click.command("tune")
@click.argument("spec", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Folder for trials and report; goes on from them.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="Combinations to try at most.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds after which no trial begins.")
@click.option("--ray", metavar="ADDRESS", help="A Ray cluster whose nodes make the trials, side by side.")
@JSON
def tune_(spec: Path, output: Path, trials: int, timeout: float | None, ray: str | None, as_json: bool) -> None:
    """Find the best spec within limits.

    SPEC leaves values to be chosen, such as {"choose": [2, 3]} for an interval. Each trial builds and measures one spec
    on this machine; those that cannot fit are refused before. The best is written beside SPEC, as NAME-tuned.json. The
    same command goes on where one was killed.

    \b
    diffkiln tune spec.json -o tuning --trials 12
    """
    needs_compiler()
    from diffkiln.evaluate.report import needs_packages
    from diffkiln.evaluate.tune import tune
    from diffkiln.evaluate.tuned import page

    needs_packages()
    with Watch() as watch:
        tuned = tune(spec, output, trials=trials, timeout=timeout, ray=ray, progress=watch)
    report = output / "report.html"
    report.write_text(page(tuned), encoding="utf-8")
    if as_json:
        print_json(tuned.as_json() | {"report": str(report)})
        return
    print_tuned(tuned)
    show(str(report))
    show(str(tuned.path))
    say(f"next: diffkiln compile {tuned.path} -o bundle")
