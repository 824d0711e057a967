"""A bundle as the original diffusers pipeline: its own class, with engines plugged in and diffusers' own offloading.

This and `originals` are the only parts of the runtime that import diffusers and transformers, when they are called.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import Manifest, Policy, Verified, strict_json
from diffkiln.bundle.scratch import Scratch, scratch
from diffkiln.errors import DiffkilnError, Incompatible, IntegrityError, ManifestInvalid, MissingDependency
from diffkiln.guards.building import check_config
from diffkiln.guards.limits import active
from diffkiln.guards.tokenizing import BoundedTokenizer
from diffkiln.interpreter.attention import by_kernel
from diffkiln.program import NATIVE, Module, is_rebatched
from diffkiln.runtime.attention import check_kernels
from diffkiln.runtime.compatibility import check_manifest
from diffkiln.runtime.diffusers.building import build, class_of, quiet, read_weights
from diffkiln.runtime.diffusers.checks import check_configurations, check_index, library_and_class
from diffkiln.runtime.opening import open_engines, read_constants, read_modules
from diffkiln.runtime.shims import plug_in
from diffkiln.runtime.targets import place_for


def load_as_diffusers(
    verified: Verified,
    *,
    allow_native: bool,
    policy: Policy | None = None,
    device: Any = None,
    check_engines: bool | None = None,
) -> Any:
    """The original pipeline with the bundle's weights and engines.

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
    place = place_for(manifest, device)
    offload: Any = manifest.runtime.get("offload")
    _refuse_quantized_on_disk(manifest, place, offload)
    attentions = {
        str(row.options["component"]): str(row.options["backend"])
        for row in manifest.passes
        if row.name == "attention_backend"
    }
    check_kernels({component: [kernel] for component, kernel in attentions.items()}, place)
    modules = read_modules(verified)
    eager = manifest.runtime.get("on_incompatible") == "eager"
    _refuse_guidance(manifest, modules, eager)
    constants = {key: tensor.to(place) for key, tensor in read_constants(verified).items()}
    engines = open_engines(verified, modules, constants, place, allow_native, policy, check_engines)
    pipe = _pipeline(verified)
    for component, kernel in attentions.items():
        _choose_attention(pipe.components[component], component, kernel)
    for name, recorded in modules.items():
        own = {region: engine for (component, region), engine in engines.items() if component == name}
        if name in manifest.weights:
            plug_in(pipe.components[name], recorded, own, constants, eager)
    if offload is None:
        pipe.to(place)
    else:
        _offload(pipe, place, offload)
    for row in manifest.passes:
        if row.name == "cache_schedule":
            _enable_cache(pipe, row.options)  # after offloading, so that a step that reuses moves no weights
    weakref.finalize(pipe, verified.close)  # engines live in files that the bundle holds
    return pipe


def _pipeline(verified: Verified) -> Any:
    """The pipeline from the bundle's configuration and weights."""
    check_configurations(verified)
    with scratch("pipeline") as folder:
        for row in verified.manifest.files:
            if row.path.startswith("pipeline/"):
                target = folder / row.path.removeprefix("pipeline/")
                target.parent.mkdir(parents=True, exist_ok=True)
                content = verified.read(row.path)
                _check_configuration(row.path, content)
                target.write_bytes(content)
        try:
            with quiet():
                return _from(folder, verified)
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


def _from(folder: Path, verified: Verified) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    manifest = verified.manifest
    index = json.loads((folder / "model_index.json").read_text())
    kind = class_of("diffusers", index.get("_class_name"))
    if not issubclass(kind, DiffusionPipeline) or kind.__name__ != manifest.pipeline.class_name:
        raise IntegrityError(f"model_index.json names {index.get('_class_name')!r}, the manifest another pipeline")
    check_index(kind, index, manifest.weights)
    parts: dict[str, Any] = {}
    for component, rows in manifest.weights.items():
        library, name = library_and_class(component, index.get(component))
        weights = read_weights(verified, rows)
        passes = [row for row in manifest.passes if row.options.get("component") == component]
        parts[component] = build(folder / component, class_of(library, name), weights, passes)
    return kind.from_pretrained(folder, local_files_only=True, **parts)


_SCHEDULER = "scheduler_config.json"
#: Methods of a component that a pipeline calls.
_METHODS = ("forward", "encode", "decode")

#: What diffusers calls the kernels of packages. It has the fourth FlashAttention from the Hub alone.
_IN_DIFFUSERS = {"flash_2": "flash", "flash_3": "_flash_3", "sage": "sage", "xformers": "xformers"}


def _choose_attention(module: torch.nn.Module, component: str, kernel: str) -> None:
    """Have a module's attention computed by this kernel.

    torch's own are switched on around the module's methods: diffusers' `set_attention_backend` does nothing for UNets,
    VAEs, text encoders and older transformers, and changes all pipelines of the process besides.

    Raises:
        Incompatible: diffusers has no such kernel for the module, or it cannot be used.
    """
    if kernel in NATIVE:
        for name in _METHODS:
            if callable(method := getattr(module, name, None)):
                setattr(module, name, by_kernel(method, kernel, component))
        return
    if kernel not in _IN_DIFFUSERS or not _heeds_backends(module):
        raise Incompatible(
            f"diffusers cannot compute the attention of {component} ({type(module).__name__}) by {kernel}. Load the "
            "bundle without as_diffusers"
        )
    from diffusers.models.attention_dispatch import attention_backend

    own: Any = module
    try:
        with quiet(), attention_backend("native"):  # which puts back what is set for the whole process
            own.set_attention_backend(_IN_DIFFUSERS[kernel])
    except (RuntimeError, ImportError) as error:
        raise Incompatible(f"diffusers cannot use {kernel} for {component}: {error}") from error


def _heeds_backends(module: torch.nn.Module) -> bool:
    """Whether all attention of a module asks diffusers which kernel to use."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    parts = [part for part in module.modules() if isinstance(part, (Attention, MochiAttention, AttentionModuleMixin))]
    return bool(parts) and all(hasattr(part.processor, "_attention_backend") for part in parts)


def _enable_cache(pipe: Any, options: Any) -> None:
    """diffusers' own hook for a schedule.

    Raises:
        Incompatible: diffusers has none that does what the bundle's programs do, or not for this model.
    """
    method, component = str(options["method"]), str(options["component"])
    config = _cache_config(pipe, method, options)
    if config is None:
        raise Incompatible(
            f"diffusers has no hook that does what this schedule of {component} does ({method}). Load the bundle "
            "without as_diffusers"
        )
    if method not in _WITHOUT_CONTEXT and "cache_context(" not in inspect.getsource(type(pipe)):
        raise Incompatible(
            f"{type(pipe).__name__} does not tell diffusers' hooks which of its calls is which, which {method} needs. "
            "Load the bundle without as_diffusers"
        )
    try:
        pipe.components[component].enable_cache(config)
    except Exception as error:  # whatever diffusers raises for a model that its hooks do not know
        kind = type(pipe.components[component]).__name__
        raise Incompatible(f"diffusers' hook for {method} does not fit {kind}: {error}") from error


def _cache_config(pipe: Any, method: str, options: Any) -> Any:
    """diffusers' configuration that means the same, or None."""
    from diffusers import hooks as library

    hooks: Any = library  # its names are found when they are asked for
    timestep = {"current_timestep_callback": lambda: pipe.current_timestep}
    match method:
        case "first_block" if options["dynamic"]:
            return hooks.FirstBlockCacheConfig(threshold=options["threshold"])
        case "seacache":
            return hooks.SeaCacheConfig(threshold=options["threshold"])
        case "pab":
            return hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=options["interval"], **timestep
            )
        case "fastercache":
            return hooks.FasterCacheConfig(spatial_attention_block_skip_range=options["interval"], **timestep)
        case "magcache":
            return hooks.MagCacheConfig(
                threshold=options["threshold"],
                max_skip_steps=options["max_reused"],
                retention_ratio=options["retention"],
                num_inference_steps=len(options["ratios"]),
                mag_ratios=list(options["ratios"]),
            )
        case "taylorseer" if "interval" in options and (options["keep"], options["start"], options["end"]) == _PLAIN:
            return hooks.TaylorSeerCacheConfig(
                cache_interval=options["interval"],
                disable_cache_before_step=-1,  # so that step 0 is one of the interval's
                max_order=options["order"],
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            )
    return None


#: Hooks of attentions, which need not know which call of a step they are in.
_WITHOUT_CONTEXT = ("pab", "fastercache")

#: What is kept, how many steps at the beginning compute, and at the end: what diffusers' TaylorSeer can do as well.
_PLAIN = ("output", 1, 0)


def _refuse_quantized_on_disk(manifest: Manifest, place: torch.device, offload: Any) -> None:
    rows = [row.options for row in manifest.passes if row.name == "quantize"]
    quantized = [str(options["component"]) for options in rows if options.get("backend") == "torchao"]
    if quantized and _to_disk(place, offload):
        raise Incompatible(
            f"diffusers cannot offload torchao weights to disk, and {', '.join(quantized)} has them. Load the bundle "
            "without as_diffusers, or compile it without offloading"
        )


def _refuse_guidance(manifest: Manifest, modules: Mapping[str, Module], eager: bool) -> None:
    """diffusers guides every step, and calls the denoiser with its own batch."""
    compiled = {row.component for row in manifest.engines}
    for options in (row.options for row in manifest.passes if row.name == "guidance"):
        component = str(options["component"])
        if options.get("steps") is not None:
            raise Incompatible(
                f"diffusers guides {component} in every step, and this bundle leaves guidance out of some. Load the "
                "bundle without as_diffusers"
            )
        if component in compiled and is_rebatched(modules[component]) and not eager:
            raise Incompatible(
                f"the engines of {component} are for the batch that guidance has there ({options['batch']}), and "
                "diffusers calls it with another. Load the bundle without as_diffusers, or compile it with "
                '"on_incompatible": "eager" in "runtime", so that diffusers\' own blocks run'
            )


def _to_disk(place: torch.device, offload: Any) -> bool:
    default = "host" if place.type == "cuda" else "disk"
    return offload is not None and offload.get("to", default) == "disk"


def _offload(pipe: Any, place: torch.device, offload: Any) -> None:
    """diffusers' group offloading, component by component: in one folder their files would have the same names."""
    from diffusers.hooks.group_offloading import apply_group_offloading

    options: dict[str, Any] = {
        "onload_device": place,
        "offload_device": torch.device("cpu"),
        "offload_type": offload["type"],
        "num_blocks_per_group": int(offload["num_blocks_per_group"]),
        "use_stream": bool(offload.get("use_stream")) and place.type == "cuda",
    }
    root = None
    if _to_disk(place, offload):
        made = Scratch("offload")
        root = made.path
        weakref.finalize(pipe, made.remove)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            options["offload_to_disk_path"] = str(root / name) if root else None
            own: Any = getattr(module, "enable_group_offload", None)
            if own is not None:
                own(**options)
            else:
                apply_group_offloading(module, **options)
