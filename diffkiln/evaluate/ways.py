"""Ways to draw what a bundle draws: the bundle itself, another one, and the original pipeline with diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffkiln.bundle import Bundle, open_bundle
from diffkiln.bundle.layout import MANIFEST, SPEC
from diffkiln.errors import CallError, Incompatible, IntegrityError, MissingDependency, SpecError
from diffkiln.evaluate.calls import Call, call_of
from diffkiln.program.planner import PlannedCall
from diffkiln.runtime.memory import plan_memory

#: The ways with diffusers, by the words of `--against`: of the source, and of the bundle itself.
EAGER, COMPILE, AS_DIFFUSERS = "eager", "compile", "as_diffusers"
#: The kind of the way of a bundle.
BUNDLE = "bundle"


@dataclass(frozen=True)
class Way:
    """One way to draw.

    Attributes:
        name: as results show it.
        job: what `diffkiln.evaluate.child` is given, without the call.
        call: what it is called with.
        weights: bytes of its weights, by component; empty where nobody counts them.
        planned: the plan of the call that takes the most memory; None where none is made.
    """

    name: str
    job: Mapping[str, Any]
    call: Call
    weights: Mapping[str, int] = field(default_factory=dict)
    planned: PlannedCall | None = None

    @property
    def is_bundle(self) -> bool:
        return self.job["kind"] == BUNDLE


@dataclass(frozen=True)
class Asked:
    """The way in which bundles are loaded, and where the source of the first one is."""

    allow_native: bool = False
    device: str | None = None
    source: Path | None = None


def ways_of(bundle: Path, against: tuple[str, ...], asked: Asked) -> list[Way]:
    """Returns the bundle's own way and those that it is compared with. No weight is read.

    Args:
        bundle: a bundle's directory.
        against: `eager`, `compile`, `as_diffusers`, or directories of bundles or of models in diffusers' format.
        asked: how they are loaded.

    Raises:
        SpecError: there is no such way, or the bundles make pictures of different sizes.
        SourceError: the source is not known.
        IntegrityError: a bundle is not whole.
    """
    own = bundle_way(bundle, asked)
    ways = [own, *(other_way(bundle, own, word, asked) for word in dict.fromkeys(against))]
    for way in ways[1:]:
        check_sizes(own, way)
    return [replace(way, name=_unlike(way.name, ways[:number])) for number, way in enumerate(ways)]


def _unlike(name: str, others: Sequence[Way]) -> str:
    """Returns a name that no other way has."""
    again = sum(other.name == name for other in others)
    return f"{name} ({again + 1})" if again else name


def bundle_way(path: Path, asked: Asked) -> Way:
    """Returns the way of a bundle."""
    with open_bundle(path) as bundle:
        manifest, call = bundle.manifest, call_of(bundle)
        weights = {name: sum(row.bytes for row in rows) for name, rows in manifest.weights.items()}
        job = {
            "kind": BUNDLE,
            "path": str(path.absolute()),
            "identity": bundle.id,
            "allow_native": asked.allow_native,
            "device": asked.device,
            "as_diffusers": bool(manifest.runtime.get("only_diffusers")),
        }
    planned = None if job["as_diffusers"] else _planned(path)
    return Way(path.name or str(path), job, call, weights, planned)


def _planned(path: Path) -> PlannedCall | None:
    """Returns the plan of the call of a bundle's first variant that takes the most memory.

    None for a bundle that cannot be read; its process says why.
    """
    try:
        calls = next(iter(plan_memory(path).values()))
    except (IntegrityError, Incompatible):
        return None
    return max(calls.values(), key=lambda call: call.residency.peak)


def other_way(bundle: Path, own: Way, word: str, asked: Asked) -> Way:
    """Returns the way that one word of `--against` names."""
    if word in (EAGER, COMPILE):
        return _diffusers_way(bundle, own, word, asked.source, asked)
    if word == AS_DIFFUSERS:
        _need_diffusers(word)
        job = {**own.job, "as_diffusers": True}
        return replace(own, name=f"{own.name}, as_diffusers", job=job, planned=None)
    path = Path(word)
    if (path / MANIFEST).is_file():
        return bundle_way(path, asked)
    if (path / "model_index.json").is_file():
        return _folder_way(own, path, asked)
    raise SpecError(
        f"--against {word}: there is no bundle and no model in diffusers' format. Write eager, compile, or a directory "
        "with a manifest.json or a model_index.json"
    )


def check_sizes(one: Way, other: Way) -> None:
    """Checks that two ways make pictures of the same size.

    Raises:
        SpecError: they do not.
    """
    for name, size in one.call.size.items():
        if size != other.call.size[name]:
            raise SpecError(
                f"{one.name} and {other.name} cannot be compared: {name} is {size} in one and {other.call.size[name]} "
                "in the other. Compile both for the same sizes"
            )
    made, others = one.call.picture, other.call.picture
    if made and others and made != others:
        sides = [" x ".join(map(str, sides)) for sides in (made, others)]
        raise SpecError(
            f"{one.name} and {other.name} cannot be compared: the pictures of one are {sides[0]} and the other's "
            f"{sides[1]}. Compile both for the same sizes, and with the same model behind the decoder"
        )


def read_spec(bundle: Bundle) -> dict[str, Any]:
    """Returns what a bundle's `spec.json` holds."""
    with bundle.verify(roles={"config"}) as verified:
        return json.loads(verified.read(SPEC))


def _diffusers_way(path: Path, own: Way, word: str, folder: Path | None, asked: Asked) -> Way:
    _need_diffusers(word)
    from diffkiln.compiler.origin import origin_of

    with open_bundle(path) as bundle:
        spec, identity, device = read_spec(bundle), bundle.id, bundle.manifest.runtime.get("device")
    origin = origin_of(identity, spec, folder)
    job = {
        "kind": word,
        "path": str(origin.model.folder if origin.plain else folder or ""),
        "class_name": origin.model.class_name if origin.plain else "",
        "dtypes": origin.dtypes,
        "variant": origin.model.origin.get("variant"),
        "identity": identity,
        "spec": spec,
        "device": asked.device or device,
    }
    weights = {name: origin.model.weight_bytes(name) for name in origin.model.modules} if origin.plain else {}
    return Way(_NAMES[word], job, own.call, weights)


_NAMES = {EAGER: "eager diffusers", COMPILE: "torch.compile"}


def _folder_way(own: Way, path: Path, asked: Asked) -> Way:
    _need_diffusers(str(path))
    from diffkiln.models.opening import open_source
    from diffkiln.spec.model import Source

    model = open_source(Source(model=str(path.absolute())), Path())
    job = {
        "kind": EAGER,
        "path": str(path.absolute()),
        "class_name": model.class_name,
        "dtypes": model.dtypes,
        "variant": None,
        "identity": model.digest(),
        "device": asked.device or own.job["device"],
    }
    weights = {name: model.weight_bytes(name) for name in model.modules}
    return Way(f"{path.name}, eager", job, _call_of_model(own, weights), weights)


def _call_of_model(own: Way, modules: Mapping[str, Any]) -> Call:
    """Returns the call of a model's own pipeline, whose pictures nothing enlarges."""
    sides = tuple(own.call.fixed.get(name) for name in ("height", "width"))
    plain = own.weights.keys() <= modules.keys() or None in sides
    return own.call if plain else replace(own.call, picture=sides)


def _need_diffusers(word: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("diffusers", "transformers", "accelerate") if find_spec(name) is None]:
        raise MissingDependency(f"--against {word} needs {', '.join(missing)}: pip install 'diffkiln[compile]'")


def need_pictures(way: Way) -> None:
    """Raises `CallError` for a way that makes something else than images or frames."""
    if not way.call.makes_pictures:
        raise CallError(f"{way.name} makes {way.call.result}, and pictures alone can be compared")
