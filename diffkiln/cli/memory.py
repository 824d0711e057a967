"""The command that says how much memory a bundle takes, or the bundle that a spec would make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffkiln.cli.group import FILE, JSON, needs_compiler
from diffkiln.cli.printing import print_json, print_table, say, show, size_of
from diffkiln.guards.amounts import bytes_of

if TYPE_CHECKING:
    from diffkiln.program.planner import PlannedCall
    from diffkiln.program.work import Ceilings
    from diffkiln.spec import Target

#: What a call's plan is called.
_STRATEGIES = {
    "resident": "all weights stay in memory",
    "group": "each group of weights comes and goes",
    "stream": "weights come through slots of a fixed size",
    "auto": "some weights stay in memory, and the others come and go",
}


class Amount(click.ParamType):
    """An amount of memory, such as 8GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the amount in bytes. Fails for what is none."""
        try:
            return bytes_of(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


MAX_MEMORY = click.option(
    "--max-memory", type=Amount(), metavar="SIZE", help="Most memory of a call, such as 8GiB (default: the bundle's)."
)


@click.command("memory")
@click.argument("bundle", type=FILE, metavar="BUNDLE|SPEC")
@MAX_MEMORY
@JSON
def memory_(bundle: Path, max_memory: int | None, as_json: bool) -> None:
    """Show how much memory BUNDLE or SPEC takes.

    Lists the largest moment of each phase of a call: weights with constants, results, and all together. Nothing runs.
    Of a spec the call is recorded, and no weight is read. On a CPU the total has what libraries and operators take for
    themselves, as the build measured it. Not counted are a GPU's context and what its operators take. For GPUs whose
    numbers are known it prints the least time that their arithmetic, memory and link allow.

    \b
    diffkiln memory bundle --max-memory 8GiB
    diffkiln memory spec.json
    """
    if not bundle.exists():
        raise click.BadParameter(f"there is no bundle and no spec at {bundle}", param_hint="BUNDLE|SPEC")
    plans = _of_spec(bundle, max_memory) if bundle.is_file() else _of_bundle(bundle, max_memory)
    targets = _targets(bundle)
    if as_json:
        print_json({name: {key: _json(plan, targets) for key, plan in calls.items()} for name, calls in plans.items()})
        return
    for name, calls in plans.items():
        plan = max(calls.values(), key=lambda plan: plan.residency.peak)
        _print_largest(name, plan)
        _print_least(plan, targets)
    if bundle.is_dir() and max_memory is not None:
        say(f"next: diffkiln run {bundle} --max-memory {max_memory} --prompt TEXT -o image.png")


def _of_bundle(bundle: Path, max_memory: int | None) -> dict[str, dict[str, PlannedCall]]:
    from diffkiln.runtime.memory import plan_memory

    return plan_memory(bundle, max_memory=max_memory)


def _of_spec(spec: Path, max_memory: int | None) -> dict[str, dict[str, PlannedCall]]:
    needs_compiler()
    from diffkiln.compiler.compile import plan_memory_of

    return plan_memory_of(spec, max_memory=max_memory)


def _targets(bundle: Path) -> list[Target]:
    """Returns the targets of a bundle or a spec that have a name here."""
    from diffkiln.bundle import open_bundle
    from diffkiln.spec import TARGETS, parse_spec, resolve_targets

    if bundle.is_file():
        return list(resolve_targets(parse_spec(bundle)))
    with open_bundle(bundle) as opened:
        names: Any = opened.manifest.runtime.get("targets") or {}
    return [TARGETS[name] for name in names if name in TARGETS]


def _print_least(plan: PlannedCall, targets: list[Target]) -> None:
    """Prints the arithmetic of a step, the weights that it brings in, and the least time that GPUs take for it."""
    from diffkiln.evaluate.ceilings import ceilings_of

    for phase in plan.phases:
        if phase.steps:
            brought = f", {size_of(phase.brought // phase.steps)} of weights" if phase.brought else ""
            show(f"each of {phase.steps} steps: {phase.work.total / phase.steps / 1e9:,.3g} GFLOP{brought}")
    for target in targets:
        ceilings = ceilings_of(target)
        if found := plan.seconds(ceilings):
            step = f", {found['step'] * 1e3:,.3g} ms for each step" if "step" in found else ""
            show(f"{target.name}: at least {found['call']:.3g} s{step}{_bound(plan, ceilings)}")


def _bound(plan: PlannedCall, ceilings: Ceilings) -> str:
    """Returns what the time of a step is made of, where weights come over a link that is known."""
    for phase in plan.phases:
        if phase.steps and phase.brought and ceilings.link:
            computing, coming = phase.computing(ceilings), ceilings.arrival(phase.brought)
            parts = [f"{seconds / phase.steps * 1e3:,.3g} ms" for seconds in (computing, coming)]
            how = "at the same time" if phase.ahead else "one after the other"
            return f" ({parts[0]} of arithmetic and memory, {parts[1]} of weights over the link, {how})"
    return ""


def _json(plan: PlannedCall, targets: list[Target]) -> dict[str, Any]:
    """Returns a plan with the least seconds of each GPU whose numbers are known, as a JSON value."""
    from diffkiln.evaluate.ceilings import ceilings_of

    least = {target.name: plan.seconds(ceilings_of(target)) for target in targets}
    return {**plan.as_json(), "least_seconds": {name: found for name, found in least.items() if found}}


def _print_largest(variant: str, plan: PlannedCall) -> None:
    """Prints the call of a variant that takes the most."""
    residency = plan.residency
    show(f"{variant}: {size_of(residency.peak)}, {_STRATEGIES[residency.strategy]}")
    if plan.working is not None:
        show(f"{size_of(plan.working.nbytes)} of it are working memory, {plan.working.origin}")
    rows = [
        [row.phase, row.component, size_of(row.weights), size_of(row.results), size_of(row.total)] for row in plan.rows
    ]
    print_table(("phase", "component", "weights", "results", "total"), rows)
    if residency.brought:
        show(f"each call brings in {size_of(residency.brought)} of weights")
