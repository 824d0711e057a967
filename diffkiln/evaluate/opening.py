"""Opens a pipeline for each kind of way. Diffusers is imported where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffkiln.evaluate.ways import BUNDLE, COMPILE, EAGER


def open_way(job: Mapping[str, Any]) -> Any:
    """Returns the pipeline of a way's job, without progress bars.

    Raises:
        IntegrityError, Incompatible: as `diffkiln.load`.
        SourceError: the source cannot be loaded.
    """
    pipe = _WAYS[job["kind"]](job)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _bundle(job: Mapping[str, Any]) -> Any:
    from diffkiln.interpreter.modular import ordinary_of
    from diffkiln.runtime.loading import load

    as_diffusers = job.get("as_diffusers", False)
    return ordinary_of(
        load(job["path"], allow_native=job["allow_native"], device=job["device"], as_diffusers=as_diffusers)
    )


def _eager(job: Mapping[str, Any]) -> Any:
    pipe = _plain(job) if job["class_name"] else _by_component(job)
    return pipe.to(job["device"]) if job["device"] not in (None, "cpu") else pipe


def _plain(job: Mapping[str, Any]) -> Any:
    import diffusers
    import torch

    from diffkiln.interpreter.modular import as_ordinary
    from diffkiln.interpreter.quiet import quiet_libraries
    from diffkiln.models.folder import read_index

    kind = as_ordinary(getattr(diffusers, job["class_name"]), read_index(Path(job["path"])))
    dtypes = {name: getattr(torch, dtype) for name, dtype in job["dtypes"].items()}
    options = {"variant": job["variant"]} if job["variant"] else {}
    with quiet_libraries():
        return kind.from_pretrained(job["path"], dtype=dtypes or None, local_files_only=True, **options)


def _by_component(job: Mapping[str, Any]) -> Any:
    from diffkiln.compiler.origin import eager_pipeline, origin_of

    return eager_pipeline(origin_of(job["identity"], job["spec"], Path(job["path"]) if job["path"] else None))


def _compiled(job: Mapping[str, Any]) -> Any:
    pipe = _eager(job)
    models = [part for part in pipe.components.values() if _is_denoiser(part)]
    for model in models:
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(fullgraph=True)
        else:
            model.compile()
    return pipe


def _is_denoiser(part: Any) -> bool:
    """Returns True for a model of diffusers without a decoder."""
    return hasattr(part, "forward") and type(part).__module__.startswith("diffusers.") and not hasattr(part, "decode")


_WAYS: dict[str, Callable[[Mapping[str, Any]], Any]] = {BUNDLE: _bundle, EAGER: _eager, COMPILE: _compiled}


def taken(pipe: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords that the pipeline's call takes; a bundle takes all of its own."""
    if hasattr(pipe, "bundle"):
        return dict(keywords)
    import inspect

    known = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in keywords.items() if name in known}
