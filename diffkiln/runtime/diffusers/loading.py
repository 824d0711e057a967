"""A bundle as the original diffusers pipeline: its own class, with engines plugged in and diffusers' own offloading.

This and `originals` are the only parts of the runtime that import diffusers and transformers, when they are called.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import Policy, Verified, strict_json
from diffkiln.bundle.layout import PIPELINE
from diffkiln.bundle.scratch import scratch
from diffkiln.errors import DiffkilnError, Incompatible, IntegrityError, ManifestInvalid, MissingDependency
from diffkiln.guards.building import check_config
from diffkiln.guards.limits import active
from diffkiln.guards.tokenizing import BoundedTokenizer
from diffkiln.interpreter.modular import as_ordinary, original_of
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import Module
from diffkiln.runtime.attention import check_kernels
from diffkiln.runtime.compatibility import check_manifest
from diffkiln.runtime.diffusers.adapters import guard_adapters
from diffkiln.runtime.diffusers.building import build, class_of, pass_of, read_weights
from diffkiln.runtime.diffusers.checks import check_configurations, check_index, library_and_class
from diffkiln.runtime.diffusers.offloading import enable_offload, to_disk
from diffkiln.runtime.engine_blocks import EngineBlock, plug_in
from diffkiln.runtime.opening import open_engines, read_constants, read_modules
from diffkiln.runtime.targets import device_for


def load_as_diffusers(
    verified: Verified,
    *,
    allow_native: bool,
    policy: Policy | None = None,
    device: Any = None,
    check_engines: bool | None = None,
) -> Any:
    """Loads the original pipeline with the bundle's weights and engines, as `load_as_ordinary` does."""
    return original_of(
        load_as_ordinary(verified, allow_native=allow_native, policy=policy, device=device, check_engines=check_engines)
    )


def load_as_ordinary(
    verified: Verified,
    *,
    allow_native: bool,
    policy: Policy | None = None,
    device: Any = None,
    check_engines: bool | None = None,
) -> Any:
    """Loads the pipeline with the bundle's weights and engines; a modular one in the shape of an ordinary one.

    Args:
        verified: the bundle. It is closed when the pipeline is there.
        allow_native: load native code though this user did not build the bundle here.
        policy: whose signatures count.
        device: where to run; the bundle's target by default.
        check_engines: as `diffkiln.load`.

    Raises:
        MissingDependency: diffusers is not installed.
        Incompatible: the machine or the installed diffusers does not fit, or diffusers cannot offload these weights.
        IntegrityError: a weight is missing, or one is there that the model does not have.
    """
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"as_diffusers needs {error.name}: pip install 'diffkiln[compile]'") from None
    manifest = verified.manifest
    check_manifest(manifest)
    chosen = device_for(manifest, device)
    offload: Any = manifest.runtime.get("offload")
    modules = read_modules(verified)
    eager = manifest.runtime.get("on_incompatible") == "eager"
    compiled = frozenset(row.component for row in manifest.engines)
    restored = _Restored(modules, compiled, eager, to_disk(chosen, offload), chosen)
    for row in manifest.passes:
        pass_of(row).check_restore(row.options, restored)
    constants = {key: tensor.to(chosen) for key, tensor in read_constants(verified).items()}
    engines = open_engines(verified, modules, constants, chosen, allow_native, policy, check_engines)
    pipe = _pipeline(verified)
    for row in manifest.passes:
        if (component := str(row.options["component"])) in pipe.components:
            pass_of(row).restore_call(pipe.components[component], row.options)
    blocks: list[EngineBlock] = []
    for name, recorded in modules.items():
        own = {region: engine for (component, region), engine in engines.items() if component == name}
        if name in manifest.weights:
            blocks += plug_in(pipe.components[name], recorded, own, constants, eager)
    if offload is None:
        pipe.to(chosen)
    else:
        enable_offload(pipe, chosen, offload)
    for row in manifest.passes:
        pass_of(row).restore_run(pipe, row.options)  # after offloading, so that a step that reuses moves no weights
    for name in manifest.weights:
        guard_adapters(pipe.components[name], name, manifest.passes)
    for block in blocks:
        block.watch(to_disk(chosen, offload))  # only now, since offloading and hooks change the blocks, too
    weakref.finalize(pipe, verified.close)  # engines live in files that the bundle holds
    return pipe


@dataclass(frozen=True)
class _Restored:
    """The facts of the bundle that passes need: `diffkiln.passes.base.Restored`."""

    modules: Mapping[str, Module]
    compiled: frozenset[str]
    eager: bool
    to_disk: bool
    device: torch.device

    def check_kernel(self, component: str, kernel: str) -> None:
        check_kernels({component: [kernel]}, self.device)


def with_modules(verified: Verified, modules: Mapping[str, torch.nn.Module]) -> Any:
    """Returns the pipeline from the bundle's configuration, with these modules in the place of those of its weights."""
    return _pipeline(verified, modules)


def _pipeline(verified: Verified, modules: Mapping[str, torch.nn.Module] | None = None) -> Any:
    """Returns the pipeline from the bundle's configuration and weights, or with other modules."""
    check_configurations(verified)
    with scratch("pipeline") as folder:
        for row in verified.manifest.files:
            if row.path.startswith(PIPELINE):
                target = folder / row.path.removeprefix(PIPELINE)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = verified.read(row.path)
                _check_configuration(row.path, content)
                target.write_bytes(content)
        try:
            with quiet_libraries():
                return _from(folder, verified, modules)
        except DiffkilnError:
            raise
        except Exception as error:  # whatever the libraries raise
            raise Incompatible(
                f"diffusers cannot build {verified.manifest.pipeline.class_name} from the bundle (made with diffusers "
                f"{verified.manifest.pipeline.diffusers_version}): {type(error).__name__}: {error}"
            ) from error


def _check_configuration(path: str, content: bytes) -> None:
    """Checks what diffusers and transformers would build from without limits."""
    file = path.rpartition("/")[2]
    if file == "tokenizer.json":
        BoundedTokenizer(content, path)
    elif file.endswith(".json"):
        try:
            config = strict_json.loads(content, max_bytes=active().json_bytes, constants=True)
        except strict_json.StrictJSONError as error:
            raise ManifestInvalid(f"{path!r}: {error}") from error
        if file in ("config.json", _SCHEDULER):
            check_config(config, path, scheduler=file == _SCHEDULER)


def _from(folder: Path, verified: Verified, modules: Mapping[str, torch.nn.Module] | None) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    manifest = verified.manifest
    index = json.loads((folder / "model_index.json").read_text())
    kind = as_ordinary(class_of("diffusers", index.get("_class_name")), index)
    if not issubclass(kind, DiffusionPipeline) or kind.__name__ != manifest.pipeline.class_name:
        raise IntegrityError(f"model_index.json names {index.get('_class_name')!r}, the manifest another pipeline")
    check_index(kind, index, manifest.weights)
    parts: dict[str, Any] = dict(modules or {})
    for component, rows in manifest.weights.items() if modules is None else ():
        library, name = library_and_class(component, index.get(component))
        weights = read_weights(verified, rows)
        passes = [row for row in manifest.passes if row.options.get("component") == component]
        parts[component] = build(folder / component, class_of(library, name), weights, passes)
    taken = inspect.signature(kind.__init__).parameters
    absent = {name: None for name, entry in index.items() if entry == [None, None] and name in taken}
    return kind.from_pretrained(folder, local_files_only=True, **absent, **parts)


_SCHEDULER = "scheduler_config.json"
