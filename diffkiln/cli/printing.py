"""What the command line prints: progress, tables, listings, JSON, images."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffkiln.errors import ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.guards.printable import printable, printable_json

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from diffkiln.bundle import Bundle
    from diffkiln.compiler.built import Built
    from diffkiln.compiler.plan import Plan
    from diffkiln.compiler.planning import SharedCall
    from diffkiln.passes.base import Pass
    from diffkiln.program.schedule import Step


class Watch:
    """The display of the stages of long work: live on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._live: Any = None

    def __enter__(self) -> Watch:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            self._live = Progress(*columns, console=Console(stderr=True))
            self._live.start()
        return self

    def __call__(self, step: str) -> None:
        if self._live is None:
            say(step)
            return
        self._finish()
        self._live.add_task(printable(step), total=1)

    def step(self, done: int, total: int) -> None:
        """Shows that `done` of `total` denoising steps have passed: on a terminal a counter, elsewhere ten lines."""
        text = f"step {done} of {total}" if total else f"step {done}"
        if self._live is None:
            if not total or total <= 10 or done == total or done * 10 // total > (done - 1) * 10 // total:
                say(text)
            return
        tasks = self._live.tasks
        if not tasks or not tasks[-1].description.startswith("step "):
            self._live.add_task(text, total=total or None)
        self._live.update(self._live.tasks[-1].id, completed=done, description=text)

    def hashing(self, total: int) -> Callable[[int], None] | None:
        """Returns a callback for the bytes hashed since its last call; `None` if hashing takes too little time to show.

        Nothing is shown at first: a bundle that an earlier load hashed needs little hashing.
        """
        if total < _WORTH_SHOWING:
            return None
        shown_from = _WORTH_SHOWING / 4
        done = 0
        task: Any = None

        def step(count: int) -> None:
            nonlocal done, task
            first = done < shown_from <= done + count
            done += count
            if self._live is None:
                if first:
                    say(f"hash {size_of(total)}")
                return
            if first:
                task = self._live.add_task("", total=total)
            if task is not None:
                text = f"hash  {size_of(done)} of {size_of(total)}"
                self._live.update(task, completed=done, description=text)

        return step

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._live is not None:
            if kind is None:
                self._finish()
            self._live.stop()

    def _finish(self) -> None:
        for task in self._live.tasks:
            self._live.update(task.id, completed=task.total)


# Bytes from which on hashing takes seconds.
_WORTH_SHOWING = 1_000_000_000


#: The calls of several processes, by the variant's name and the program's.
Shared = Mapping[str, Mapping[str, "SharedCall"]]


def print_plan(plan: Plan, shared: Shared | None = None) -> None:
    show(f"{plan.source.class_name} for {', '.join(target.name for target in plan.targets)}")
    rows = [
        [name, type(module).__name__, size_of(plan.bytes_before[name]), size_of(plan.bytes_after[name])]
        for name, module in plan.state.modules.items()
    ]
    print_table(("component", "class", "weights", "after passes"), rows)
    for ran in plan.report:
        done = f"{ran.listed.where} {ran.listed.step.name} {ran.listed.step.component}: {'; '.join(ran.notes)}"
        show(_indented(f"{done} → {size_of(ran.nbytes)}", 0))
    for notice in plan.notices:
        show(_indented(f"note: {notice}", 0))
    for name, programs in (shared or {}).items():
        for program, call in programs.items():
            most = max(call.exchanged, key=lambda step: step.nbytes)
            who = "the processes together send" if "layers" in call.mesh.counts else "each process sends"
            what = f"{who} {size_of(most.nbytes)} in a step, in {most.count} exchanges"
            show(_indented(f"{name}, {program}: {what}", 0))
            show(_indented(f"{name}, {program}: {_held_line(call)}", 0))
            for target, least in _least(plan, call).items():
                show(_indented(f"{name}, {program}: {_least_line(target, call, least)}", 0))
    show("legal")


def plan_json(plan: Plan, shared: Shared | None = None) -> Mapping[str, Any]:
    together: dict[str, Any] = {}
    if shared is not None:
        together = {
            "bytes_sent_in_each_step": _of_calls(shared, lambda call: [step.nbytes for step in call.exchanged]),
            "bytes_of_weights": _of_calls(shared, _held_json),
            "least_seconds": _of_calls(shared, lambda call: _least(plan, call)),
        }
    return {
        **together,
        "pipeline": plan.source.class_name,
        "targets": [target.name for target in plan.targets],
        "components": {
            name: {
                "class": type(module).__name__,
                "bytes": plan.bytes_before[name],
                "bytes_after_passes": plan.bytes_after[name],
            }
            for name, module in plan.state.modules.items()
        },
        "passes": [
            {
                "where": ran.listed.where,
                "name": ran.listed.step.name,
                "component": ran.listed.step.component,
                "notes": ran.notes,
                "bytes_after": ran.nbytes,
            }
            for ran in plan.report
        ],
        "facts": sorted(str(fact) for fact in plan.state.facts),
        "notices": plan.notices,
    }


def _of_calls(shared: Shared, what: Callable[[SharedCall], Any]) -> dict[str, dict[str, Any]]:
    return {name: {program: what(call) for program, call in programs.items()} for name, programs in shared.items()}


def _least(plan: Plan, call: SharedCall) -> dict[str, dict[str, float]]:
    """Returns the least seconds of a call on one GPU and on several, by target; of these the seconds of exchanges.

    Where processes hold layers, also the least seconds on one GPU to which the weights come that it has no room for.
    """
    from diffkiln.evaluate.ceilings import ceilings_of, link_of
    from diffkiln.program.mesh import LAYERS

    found: dict[str, dict[str, float]] = {}
    for target in plan.targets:
        ceilings, link = ceilings_of(target), link_of(target)
        if ceilings.flops and link is not None:
            alone, together = call.clocks(ceilings, link)
            found[target.name] = {"alone": alone.now, "together": together.now, "exchanging": together.exchanging}
            if LAYERS in call.mesh.counts and target.memory_bytes is not None:
                streamed = call.streamed(ceilings, target.memory_bytes)
                found[target.name] |= {} if streamed is None else {"streaming_on_one": streamed}
    return found


def _held_line(call: SharedCall) -> str:
    first, *others = call.held
    if len({first, *others}) == 1:
        return f"each process holds {size_of(first)} of weights"
    if len(set(others)) == 1:
        return f"the first process holds {size_of(first)} of weights, and each other {size_of(others[0])}"
    return f"the processes hold {', '.join(map(size_of, call.held))} of weights"


def _held_json(call: SharedCall) -> dict[str, Any]:
    """Returns the bytes of weights of the first process, the most of another one, and those of each."""
    first, *others = call.held
    return {"first": first, "others": max(others), "each": [first, *others]}


def _least_line(target: str, call: SharedCall, least: Mapping[str, float]) -> str:
    alone, together, exchanging = least["alone"], least["together"], least["exchanging"]
    if (streaming := least.get("streaming_on_one")) is not None:
        return (
            f"{target}: at least {together:.3g} s on {call.mesh.size}, {exchanging:.3g} s of them in exchanges; on one "
            f"{streaming:.3g} s, with weights that come in where there is no room for all"
        )
    return (
        f"{target}: at least {alone:.3g} s on one, and {together:.3g} s on {call.mesh.size} ({alone / together:.2f} "
        f"times as fast), {exchanging:.3g} s of them in exchanges"
    )


def print_built(built: Built, as_json: bool) -> None:
    """Prints the result of a build: its place and id, and its notices on the standard error."""
    for notice in built.notices:
        say(f"note: {notice}")
    if as_json:
        print_json({"path": str(built.path), "id": built.id, "notices": built.notices, "seconds": built.seconds})
    else:
        show(f"{built.path}  {built.id}")


def choice_here(bundle: Bundle) -> Mapping[str, Any]:
    """Returns the target whose engines this machine would use, with reasons for and against each. Empty without
    engines.
    """
    if not bundle.manifest.engines:
        return {}
    from diffkiln.errors import Incompatible
    from diffkiln.runtime.targets import choose, device_for

    try:
        choice = choose(bundle.manifest, device_for(bundle.manifest), bundle.targets)
    except Incompatible as error:
        return {"choice": {"target": None, "why": str(error), "others": {}}}
    return {"choice": asdict(choice)}


Schedules = Mapping[str, Mapping[str, "list[Step]"]]
"""variant → component → what each of its steps computes."""


def schedules(bundle: Bundle) -> Schedules:
    """Returns what each step of each variant computes, for the components that a caching schedule was made for."""
    from diffkiln.bundle.layout import program_file
    from diffkiln.program import module_from_json, program_from_json
    from diffkiln.program.schedule import schedule

    rows = [row.options for row in bundle.manifest.passes if row.name == "cache_schedule"]
    names = sorted({str(options.get("component")) for options in rows if not options.get("dynamic")})
    if not names or not all(variant.programs for variant in bundle.manifest.pipeline.variants):
        return {}
    with bundle.verify(roles={"program"}) as verified:
        modules = {name: module_from_json(read_json(verified, program_file(name))) for name in names}
        try:
            calls = {
                variant.name: program_from_json(read_json(verified, variant.programs["call"])["programs"]["call"])
                for variant in bundle.manifest.pipeline.variants
            }
            return {name: {part: schedule(call, modules, part) for part in names} for name, call in calls.items()}
        except (KeyError, TypeError) as error:
            raise ManifestInvalid(f"a variant's programs are malformed: {type(error).__name__} {error}") from error


def read_json(verified: Any, path: str) -> Any:
    """Returns the content of a JSON file of a bundle. Raises `ManifestInvalid` if it is not JSON."""
    from diffkiln.bundle import strict_json

    try:
        return strict_json.loads(verified.read(path), max_bytes=active().json_bytes)
    except strict_json.StrictJSONError as error:
        raise ManifestInvalid(f"{path!r}: {error}") from error


def schedules_json(found: Schedules) -> Any:
    return {
        variant: {component: [asdict(step) for step in steps] for component, steps in components.items()}
        for variant, components in found.items()
    }


def print_schedules(found: Schedules) -> None:
    from diffkiln.program.schedule import line

    for variant, components in found.items():
        for component, steps in components.items():
            show(f"schedule  {variant}  {component}  {line(steps)}")
            rows = [[str(step.number), f"{step.timestep:g}", str(step.calls), str(step.blocks)] for step in steps]
            print_table(("step", "timestep", "calls", "blocks"), rows)


def print_program(verified: Any, name: str, as_json: bool) -> None:
    from diffkiln.bundle.layout import program_file
    from diffkiln.program import listing, module_from_json, module_listing, program_from_json

    names = sorted(
        Path(row.path).stem for row in verified.manifest.files if row.role == "program" and row.path.endswith(".json")
    )
    if name not in names:
        raise click.BadParameter(
            f"there is no program {name!r}; the bundle has {', '.join(names)}", param_hint="--program"
        )
    data = read_json(verified, program_file(name))
    if as_json or not isinstance(data, dict):
        print_json(data)
    elif "component" in data:
        show(module_listing(module_from_json(data)))
    elif isinstance(data.get("programs"), dict):
        show("\n\n".join(listing(program_from_json(program)) for program in data["programs"].values()))
    else:
        print_json(data)


def print_table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() else 160
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # a plain string would be read as rich's markup
    Console(width=width).print(table)


def show(text: str = "") -> None:
    """Prints a result on the standard output."""
    click.echo(printable(text, lines=True))


def say(text: str) -> None:
    """Prints what is no result on the standard error."""
    click.echo(printable(text, lines=True), err=True)


def print_json(data: Any) -> None:
    click.echo(printable_json(data))


def size_of(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{int(count)} B"
        count /= 1000
    return f"{count:.2f} GB"


def giga(value: float | None) -> float | None:
    return None if value is None else round(value / 1e9, 1)


def word(value: Any) -> str:
    return "" if value is None else str(value)


def print_pass(name: str, model: type[Pass]) -> None:
    """Prints a pass: its options with defaults and choices, the passes it cannot follow, and examples.

    Of a pass with several methods each is printed with the options that are its own.
    """
    show(f"{name}: {model.summary}")
    _print_options(model, model.model_fields, 4)
    for variant in model.variants().values():
        _print_variant(variant, variant.model_fields.keys() - model.model_fields.keys())
    for fact, reason in model.requires_not.items():
        show(_indented(f"not after {fact}: {reason}", 4))
    for example in model.examples:
        show(_indented(f"example: {json.dumps(example)}", 4))
    show()


def _print_variant(model: type[Pass], own: Set[str]) -> None:
    """Prints the fields that tell a method apart as a spec has them, a sentence about it, and its other options."""
    properties = model.model_json_schema()["properties"]
    constants = {field: properties[field]["const"] for field in own if "const" in properties[field]}
    # What is false is so by itself.
    written = [field for field in sorted(constants, reverse=True) if constants[field]]
    apart = [f'"{field}": {json.dumps(constants[field])}' for field in written]
    sentence = " ".join((model.__doc__ or "").partition("\n\n")[0].split())
    show(_indented(f"{', '.join(apart)}: {sentence}", 4))
    _print_options(model, own - constants.keys(), 8)


def _print_options(model: type[Pass], names: Collection[str], by: int) -> None:
    properties = model.model_json_schema()["properties"]
    for field, info in model.model_fields.items():
        if field in names:
            default = "required" if info.is_required() else f"default {_default(info)}"
            choices = properties[field].get("enum")
            among = f" One of {', '.join(map(str, choices))}." if choices else ""
            show(_indented(f"{field}  ({default})", by))
            show(_indented(f"{info.description}{among}", by + 4))


def _indented(text: str, by: int) -> str:
    """Wraps a paragraph to 80 columns; its later lines are indented more."""
    return textwrap.fill(text, 80, initial_indent=" " * by, subsequent_indent=" " * (by + 2), break_on_hyphens=False)


def _default(info: FieldInfo) -> str:
    """Returns an optional field's default as JSON, also where a factory makes it."""
    from pydantic_core import to_json

    return to_json(info.get_default(call_default_factory=True)).decode()
