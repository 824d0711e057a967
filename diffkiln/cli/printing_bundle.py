"""What the command line says of one bundle: what it holds, what it needs, and the command that tries it."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkiln.cli.printing import read_json, say, show, size_of

if TYPE_CHECKING:
    from diffkiln.bundle import Bundle, GroupEntry, Manifest
    from diffkiln.cli.output_files import Made
    from diffkiln.program import Program

WIDTH, _LABEL = 80, 10
#: What the manifest says of the runtime and `needs` has told already.
_IN_NEEDS = ("targets", "gpus", "devices", "only_diffusers")


def row(label: str, text: str) -> str:
    """Returns a label and its text, wrapped to 80 columns with the text in a column of its own."""
    lines = textwrap.wrap(text, WIDTH - _LABEL, break_on_hyphens=False) or [""]
    return (label.ljust(_LABEL) + f"\n{' ' * _LABEL}".join(lines)).rstrip()


def rows(label: str, texts: Iterable[str]) -> Iterable[str]:
    """Yields a row for each text; the label stands in the first alone."""
    for text in texts:
        yield row(label, text)
        label = ""


def print_manifest(bundle: Bundle) -> None:
    """Prints what a bundle holds, at most 80 columns wide."""
    from diffkiln.bundle.card import checks_of

    manifest = bundle.manifest
    size = sum(item.size for item in manifest.files)
    variants = (_named(item.name, _given(item.fixed)) for item in manifest.pipeline.variants)
    passes = (_named(item.name, _given(item.options)) for item in manifest.passes)
    weights = (f"{name}  {_weights(groups)}" for name, groups in manifest.weights.items())
    engines = (f"{item.component}/{item.region}  {item.backend} for {item.target}" for item in manifest.engines)
    sections = {
        "id": [bundle.id],
        "source": [_pairs({key: _short(value) for key, value in manifest.source.items()})],
        "checks": [checked] if (checked := checks_of(manifest)) else [],
        "needs": needs(manifest),
        "runtime": [_pairs({key: value for key, value in _given(manifest.runtime).items() if key not in _IN_NEEDS})],
        "variants": variants,
        "passes": passes,
        "weights": weights,
        "engines": engines,
        "quality": _quality(bundle.build),
    }
    show(f"{manifest.pipeline.class_name}  {size_of(size)}")
    for label, texts in sections.items():
        for line in rows(label, texts):
            show(line)
    if not bundle.whole:
        show(row("partial", f"only the engines for {', '.join(bundle.targets) or 'no target'} are here"))


def _quality(build: Mapping[str, Any]) -> Iterable[str]:
    """Yields each gate of quality and what its metric was after each pass."""
    from diffkiln.bundle.evidence import costs_of

    for table in costs_of(build):
        yield f"{table.metric} {table.gate}"
        for name, value in table.cumulative:
            yield f"  {name}  {'not measured' if value is None else f'{value:.5g}'}"


def print_choice(found: Mapping[str, Any]) -> None:
    """Prints which target's engines this machine uses and why, and why not each of the others."""
    if not found:
        return
    choice = found["choice"]
    if choice["target"] is None:
        for line in rows("target", f"none: {choice['why']}".splitlines()):
            show(line)
        return
    others = (f"{name} is not used here: {'; '.join(why.splitlines())}" for name, why in choice["others"].items())
    for line in rows("target", [f"{choice['target']} is used here: {choice['why']}", *others]):
        show(line)


def needs(manifest: Manifest) -> list[str]:
    """Returns what a machine must offer to run the bundle, a line for each kind."""
    asked = manifest.requires
    system = f"{asked.os} on {asked.machine}" + (f", glibc {asked.glibc} or later" if asked.glibc else "")
    lines = [f"Python {asked.python}, torch {asked.torch}; {system}"]
    if manifest.engines:
        lines += _machines(manifest)
    if asked.packages:
        lines.append("packages: " + ", ".join(f"{name} {version}" for name, version in asked.packages.items()))
    if manifest.runtime.get("only_diffusers"):
        lines.append("diffusers and transformers, since the call could not be recorded")
    return lines


def _machines(manifest: Manifest) -> Iterable[str]:
    from diffkiln.bundle import device_of, engine_targets

    asked, gpus = manifest.requires, _mapping(manifest.runtime.get("gpus"))
    cuda = f", CUDA {asked.cuda}" if asked.cuda else ""
    driver = f", driver {asked.driver} or later" if asked.driver else ""
    for name in engine_targets(manifest):
        if device_of(manifest, name) == "cpu":
            yield f"target {name}: a CPU of this level or above"
        else:
            sm = _mapping(gpus.get(name)).get("sm", asked.sm)
            yield f"target {name}: a GPU that runs {sm}{cuda}{driver}"


def print_next(path: Path) -> None:
    """Says on the standard error what the bundle at `path` needs where it runs, and the command that tries it."""
    from diffkiln.bundle import open_bundle

    with open_bundle(path) as bundle:
        manifest = bundle.manifest
        say(f"size: {size_of(sum(item.size for item in manifest.files))}")
        for line in rows("needs:", needs(manifest)):
            say(line)
        say(f"install:  {install(manifest)}")
        say(f"try:      {trial(path, manifest, read_call(bundle))}")


def install(manifest: Manifest) -> str:
    """Returns the pip command that installs what runs the bundle."""
    extra = "[compile]" if manifest.runtime.get("only_diffusers") else ""
    wanted = [f"diffkiln{extra}", f"torch{manifest.requires.torch}"]
    wanted += [f"{name}{version}" for name, version in manifest.requires.packages.items()]
    return f"pip install {shlex.join(wanted)}"


#: A file for what a call makes.
_TRIED: dict[Made, str] = {"pictures": "image.png", "videos": "video.mp4", "sound": "sound.wav", "tensors": "made.npy"}


def trial(path: Path, manifest: Manifest, call: Program | None) -> str:
    """Returns a `diffkiln run` that the bundle at `path` serves; `call` is the program of its first variant."""
    from diffkiln.program.calls import text_keywords
    from diffkiln.program.images import image_keywords
    from diffkiln.runtime.processes import mesh_of

    words = ["diffkiln", "run", str(path)]
    for keyword in text_keywords([call]) if call else ["prompt"]:
        if keyword in ("prompt", "negative_prompt"):
            words += [f"--{keyword.replace('_', '-')}", "a red fox"] * (_batch(call) if call else 1)
    for keyword, count in image_keywords(call.inputs).items() if call else ():
        words += ["--image", f"{keyword}={keyword}.png"] * count
    words += ["--seed", "7"] + ["--as-diffusers"] * (call is None)
    if mesh := mesh_of(manifest):
        words += ["--processes", str(mesh.size)]
    return shlex.join([*words, "-o", _TRIED[what_it_makes(call) if call else "pictures"]])


def read_call(bundle: Bundle) -> Program | None:
    """Returns the program of the first variant's call; None where the bundle runs as diffusers only.

    Raises:
        IntegrityError: the bundle is not whole, or its program is not one.
    """
    from diffkiln.errors import ManifestInvalid
    from diffkiln.program import program_from_json

    path = bundle.manifest.pipeline.variants[0].programs.get("call")
    if path is None:
        return None
    with bundle.verify(roles={"program"}) as verified:
        try:
            data = read_json(verified, path)["programs"]["call"]
        except (KeyError, TypeError):
            raise ManifestInvalid(f"{path!r} holds no program of a call") from None
    return program_from_json(data)


def what_it_makes(call: Program) -> Made:
    """Returns what the call gives, as far as files are concerned."""
    if call.signature.get("result") == "frames":
        return "videos"
    if call.signature.get("sound"):
        return "sound"
    return "tensors" if "form" in call.signature else "pictures"


def _batch(call: Program) -> int:
    found = [item["index"] + 1 for text in call.texts for item in text["rows"] if "index" in item]
    return max(found, default=1)


def _named(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}  {_pairs(options)}".rstrip()


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options without empty ones."""
    return {name: value for name, value in options.items() if value is not None and value != {} and value != []}


def _pairs(options: Mapping[str, Any]) -> str:
    """Returns options as words. Any other value is JSON, which cannot move a terminal's cursor."""
    return ", ".join(f"{name} {_word(value)}" for name, value in options.items())


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    plain = isinstance(value, str) and value.isascii() and value.isprintable() and value and " " not in value
    return str(value) if plain else json.dumps(value)


def _short(value: Any) -> Any:
    """Returns a digest's first digits; `--json` has all of them."""
    return f"{value[:23]}..." if isinstance(value, str) and value.startswith("sha256:") else value


def _weights(groups: Sequence[GroupEntry]) -> str:
    return f"{size_of(sum(group.bytes for group in groups))} in {_count(len(groups), 'group')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
