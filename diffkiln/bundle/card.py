"""The model card of a bundle, README.md: what it was made of, what was done to it, what was measured when it was built.

It is made of the manifest and of `build.json`, which strangers may have written: what is not as expected is left out,
and every string shows as the characters that it holds. None is markup, HTML or a link.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffkiln.bundle import safe_open, strict_json
from diffkiln.bundle.evidence import costs_of
from diffkiln.bundle.layout import BUILD
from diffkiln.bundle.manifest import Manifest
from diffkiln.bundle.partial import engine_targets
from diffkiln.errors import IntegrityError
from diffkiln.guards.printable import markdown, markdown_code

MAX_BUILD_BYTES = 1 << 20
_LICENCE = ("license", "license_name", "license_link")
_LINK = re.compile(r"https?://[\w./:%#?=&~+@-]*", re.ASCII)
_TASK = re.compile(r"[a-z0-9-]{1,64}")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def read_build(data: bytes) -> Mapping[str, Any]:
    """Returns the content of `build.json`; an empty mapping if the file cannot be read."""
    try:
        build = strict_json.loads(data, max_bytes=MAX_BUILD_BYTES)
    except strict_json.StrictJSONError:
        return {}
    return build if isinstance(build, dict) else {}


def build_in(root: int) -> Mapping[str, Any]:
    """Returns the content of the `build.json` in an open directory; an empty mapping if it cannot be read."""
    try:
        return read_build(safe_open.read_small(root, BUILD, MAX_BUILD_BYTES))
    except IntegrityError:
        return {}


def card(manifest: Manifest, build: Mapping[str, Any], repo: str | None = None, identity: str | None = None) -> str:
    """Returns the text of README.md.

    Args:
        manifest: the whole bundle's.
        build: what `build.json` holds.
        repo: the repository on the Hub that the card is for; a local folder without one.
        identity: the bundle's id, where it is known.
    """
    sections = [
        _metadata(manifest, build),
        _what(manifest, build, identity),
        _use(manifest, repo),
        _variants(manifest),
        _passes(manifest, build),
        *_quality(build),
        _measured(build),
        [f"- {_line(notice)}" for notice in _list(build, "notices")],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _metadata(manifest: Manifest, build: Mapping[str, Any]) -> list[str]:
    """Returns the Hub's front matter. JSON is YAML, so every value stays a value."""
    source = _dict(build, "source")
    fields: dict[str, Any] = {key: source[key] for key in _LICENCE if isinstance(source.get(key), str | list)}
    if not _LINK.fullmatch(str(fields.get("license_link", "https://"))):
        del fields["license_link"]
    if base := _base_models(manifest, source):
        fields["base_model"] = base
        if any(row.name == "quantize" and row.changed for row in manifest.passes):
            fields["base_model_relation"] = "quantized"
    fields["library_name"] = "diffkiln"
    fields["pipeline_tag"] = _task(manifest, source)
    fields["tags"] = ["diffkiln", "compiled", *engine_targets(manifest)]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"]


def _base_models(manifest: Manifest, source: Mapping[str, Any]) -> list[str]:
    """Returns the compiled model if the Hub has it, or else the base model that the source's card names."""
    names = [manifest.source["model"]] if "model" in manifest.source else _list(source, "base_model")
    return [name for name in names if isinstance(name, str) and _HUB_ID.fullmatch(name)]


def _task(manifest: Manifest, source: Mapping[str, Any]) -> str:
    images = _images(manifest)
    given = "text" if not images else "video" if "video" in images else "image"
    if isinstance(stated := source.get("pipeline_tag"), str) and _TASK.fullmatch(
        stated
    ):  # of the class that the model names
        return f"{given}-{stated.removeprefix('text-')}" if images and stated.startswith("text-to-") else stated
    return f"{given}-to-{'video' if _films(manifest) else 'image'}"


def _films(manifest: Manifest) -> bool:
    """Returns True if the bundle makes videos."""
    return "video" in _images(manifest) or any(v.fixed.get("num_frames") for v in manifest.pipeline.variants)


def _images(manifest: Manifest) -> list[str]:
    """Returns the keywords that take images: the first variant fixes a size, or a list of sizes, for each."""

    def first(value: Any) -> Any:
        return value[0] if isinstance(value, list | tuple) and value else value

    sizes = {name: first(value) for name, value in manifest.pipeline.variants[0].fixed.items()}
    taken = [name for name, size in sizes.items() if isinstance(size, Mapping) and set(size) == {"height", "width"}]
    return sorted(filter(str.isidentifier, taken))


def _what(manifest: Manifest, build: Mapping[str, Any], identity: str | None) -> list[str]:
    version = _line(build.get("diffkiln") or "")
    origin = manifest.source.get("model") or manifest.source.get("architecture") or "a local folder"
    revision = f" at {_line(manifest.source['revision'])}" if "revision" in manifest.source else ""
    size = sum(row.bytes for rows in manifest.weights.values() for row in rows)
    targets = f" for {_line(list(engine_targets(manifest)))}" if manifest.engines else ""
    licence = _dict(build, "source").get("license")
    terms = (
        f"Licence, as the source states it: {_line(licence)}."
        if licence
        else ("The source states no licence: ask its authors before you pass the bundle on.")
    )
    return [
        f"# {_line(manifest.pipeline.class_name)}, compiled by diffkiln {version}".rstrip(),
        "",
        f"Made from {_line(origin)}{revision}. Weights: {size / 1e6:.1f} MB in {len(manifest.weights)} components; "
        f"{len(manifest.engines)} engines{targets}.",
        terms,
        *([markdown(checked)] if (checked := checks_of(manifest)) else []),
        *([f"Bundle id: `{identity}`."] if identity else []),
    ]


def checks_of(manifest: Manifest) -> str:
    """Returns what looks at the images that the bundle makes; empty where its pipeline has nothing that does."""
    if "safety_checker" in manifest.weights:
        return (
            "A safety checker looks at finished images: those that it objects to are black, and nsfw_content_detected "
            "says which they are."
        )
    if "safety_checker" in _list(manifest.source, "omit"):
        return "The safety checker of the source is left out, as its spec asks: nothing looks at finished images."
    return ""


def _use(manifest: Manifest, repo: str | None) -> list[str]:
    fetch = [f"    diffkiln pull {repo} -o bundle", ""] if repo else []
    folder = "bundle" if repo else "this/folder"
    images = "".join(f", {name}={name}" for name in _images(manifest))
    made, results = ("frames", "frames") if _films(manifest) else ("image", "images")
    return [
        *fetch,
        "    import diffkiln",
        f'    pipe = diffkiln.load("{folder}")',
        f'    {made} = pipe("a prompt"{images}).{results}[0]',
    ]


def _variants(manifest: Manifest) -> list[str]:
    rows = [[_line(v.name), _code(v.fixed)] for v in manifest.pipeline.variants]
    return _table(("variant", "fixed"), rows)


def _passes(manifest: Manifest, build: Mapping[str, Any]) -> list[str]:
    reports = [item if isinstance(item, dict) else {} for item in _list(build, "passes")]
    notes = (
        [_list(item, "notes") for item in reports]
        if len(reports) == len(manifest.passes)
        else [[]] * len(manifest.passes)
    )
    rows = [
        [_line(row.name), _line(row.options.get("component", "")), _line("; ".join(map(str, said)))]
        for row, said in zip(manifest.passes, notes, strict=True)
    ]
    return _table(("pass", "component", "what it did"), rows)


def _quality(build: Mapping[str, Any]) -> list[list[str]]:
    """Returns a table for each gate of quality: what the metric was after each pass, and with each alone."""
    made = []
    for table in costs_of(build):
        rows = [[_line(name), _value(value), _value(table.each.get(name))] for name, value in table.cumulative]
        columns = (f"{_line(table.metric)} {_line(table.gate)}", "after this pass", "with it alone")
        made.append(_table(columns, rows))
    return made


def _value(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.5g}"


def _measured(build: Mapping[str, Any]) -> list[str]:
    seconds = {key: value for key, value in _dict(build, "seconds").items() if isinstance(value, int | float)}
    rows = [[_line(f"{step}, seconds"), f"{value:.1f}"] for step, value in seconds.items()]
    if isinstance(peak := build.get("peak_rss_bytes"), int):
        rows.append(["peak memory of the build, MB", f"{peak / 1e6:.0f}"])
    host = [str(value) for value in _dict(build, "host").values()]
    versions = [f"{name} {build[name]}" for name in ("torch", "diffusers") if name in build]
    return _table(("measured when it was built", _line([*host, *versions])), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _code(value: Any) -> str:
    """Returns a code span for a cell, in which a bar needs a backslash as well."""
    return markdown_code(json.dumps(value, sort_keys=True)).replace("|", "\\|")


def _line(value: Any) -> str:
    return markdown(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _dict(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return list(value) if isinstance(value, list | tuple) else []
