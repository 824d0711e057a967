"""The source that a bundle was made from, found again: to draw with the pipeline as diffusers runs it.

A bundle names a repository on the Hub, or the digest of a folder, and never a path of the machine that built it. The
path is kept in the user's state directory there. Elsewhere the user names the folder, and its digest is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffkiln.bundle.notes import read_note, write_note
from diffkiln.compiler.check import with_added
from diffkiln.errors import SourceError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import load_module, pipeline_with
from diffkiln.models.opening import open_source
from diffkiln.models.source import SourceModel
from diffkiln.passes.registry import ListedPass, pass_classes, read_passes
from diffkiln.spec import PassEntry
from diffkiln.spec.model import Source

_NOTES = "sources"
#: Fields of a bundle's source that are no part of a spec's: what they were hashed to.
_DIGESTS = ("digest", "gguf", "single_file", "components")


@dataclass(frozen=True, eq=False)
class Origin:
    """The source of a bundle.

    Attributes:
        model: the source itself, of which no weight has been read.
        dtype: the type that the spec loads it in; None is what each component was saved in.
    """

    model: SourceModel
    dtype: str | None

    @property
    def plain(self) -> bool:
        """Returns True if one `from_pretrained` of diffusers loads all of it as the compiler does."""
        model, whole = self.model, {"revision", "model", "pipeline", "variant"}
        files = any(part.file is not None or part.members for part in model.components.values())
        return not (model.gguf or model.elsewhere or model.added or files or model.origin.keys() - whole)

    @property
    def dtypes(self) -> dict[str, str]:
        """Returns the type of each module's weights, by the module's name."""
        return {name: self.dtype or saved for name, saved in self.model.dtypes.items()}


def remember_source(identity: str, source: Source, base: Path, passes: Sequence[Mapping[str, Any]] = ()) -> None:
    """Keeps on this machine where the source of a bundle lies, and what its passes add to it."""
    kept: dict[str, Any] = {"source": source.model_dump(mode="json", exclude_none=True), "base": str(base.absolute())}
    if added := [entry for entry in passes if _adds(entry)]:
        kept["added"] = added
    write_note(_NOTES, identity, json.dumps(kept).encode())


def origin_of(identity: str, spec: Mapping[str, Any], folder: Path | None = None) -> Origin:
    """Returns the source that a bundle was made from.

    Args:
        identity: the bundle's id.
        spec: what its `spec.json` holds.
        folder: a local folder that the user says is the source; by default the one that is known on this machine.

    Raises:
        SourceError: nobody knows where it is, it cannot be read, or it is another model.
    """
    source: Any = spec.get("source")
    pinned = source if isinstance(source, dict) else {}
    given, base = _given(identity, pinned, folder)
    model = open_source(given, base)
    # A source on the Hub is fetched at its commit, and random weights follow from their seed.
    local = "revision" not in model.origin and "seed" not in model.origin
    if local and (wanted := pinned.get("digest")) is not None and model.digest() != wanted:
        raise SourceError(
            f"{model.folder} is not the model that the bundle was made from: its digest is {model.digest()[:19]}…, "
            f"and the bundle names {str(wanted)[:19]}…. Give the unchanged folder with --source"
        )
    return Origin(_with_added(model, identity, spec), given.dtype)


def _adds(entry: Mapping[str, Any]) -> bool:
    known = pass_classes()
    return entry.get("name") in known and known[str(entry["name"])].adds


def _with_added(model: SourceModel, identity: str, spec: Mapping[str, Any]) -> SourceModel:
    """Returns the source with the components that the bundle's passes add.

    Raises:
        SourceError: one of them is not known on this machine, or is another model.
    """
    source: Any = spec.get("passes")
    pinned = [entry for entry in (source if isinstance(source, list) else []) if _adds(entry)]
    if not pinned:
        return model
    entries, base = pinned, Path()
    with suppress(ValueError, KeyError, TypeError):
        kept = json.loads(read_note(_NOTES, identity) or b"null")
        entries, base = kept["added"], Path(kept["base"])
    listed = read_passes([PassEntry.model_validate(entry) for entry in entries])
    prepared = [_prepared(item, base, model) for item in listed]
    for item, wanted in zip(prepared, pinned, strict=True):
        found = item.step.options()
        if any(found.get(key) != value for key, value in wanted.items() if key in found):
            raise SourceError(
                f"the model of {item.step.component} is not the one that the bundle was made with, whose digest is "
                "another. Put the unchanged one in its place"
            )
    return with_added(model, prepared)


def _prepared(item: ListedPass, base: Path, model: SourceModel) -> ListedPass:
    try:
        return replace(item, step=item.step.prepare(base, model.pipeline_class))
    except SourceError as error:
        raise SourceError(
            f"{item.step.component}, which the bundle adds to its source, is not known on this machine: {error}. "
            "Compare on the machine that built the bundle"
        ) from error


def _given(identity: str, pinned: Mapping[str, Any], folder: Path | None) -> tuple[Source, Path]:
    """Returns the source as a spec names it, and the folder that its relative paths start from."""
    fields = {key: value for key, value in pinned.items() if key not in _DIGESTS}
    if folder is not None:
        return _source({**fields, "model": str(folder), "revision": None}), Path()
    note = read_note(_NOTES, identity)
    with suppress(ValueError, KeyError, TypeError):
        kept = json.loads(note or b"null")
        return _source(kept["source"]), Path(kept["base"])
    if "architecture" in pinned or ("model" in pinned and not pinned.keys() & set(_DIGESTS[1:])):
        return _source(fields), Path()
    raise SourceError(
        "the bundle's source is a local folder, which this machine does not know. "
        "Name the folder with --source, or compare with --against FOLDER"
    )


def _source(fields: Mapping[str, Any]) -> Source:
    try:
        return Source.model_validate({key: value for key, value in fields.items() if value is not None})
    except ValidationError:
        raise SourceError("the source that the bundle names cannot be read. Name its folder with --source") from None


def eager_pipeline(origin: Origin) -> Any:
    """Returns the original pipeline with its weights in memory, as the compiler reads them and diffusers runs it.

    Raises:
        SourceError: the weights cannot be read.
    """
    model = origin.model
    with quiet_libraries():
        pipe = pipeline_with(model, {name: load_module(model, name, origin.dtype) for name in model.modules})
    pipe.set_progress_bar_config(disable=True)
    return pipe
