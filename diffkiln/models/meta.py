"""Pipelines without weights, to record from, and modules with weights, to compile from.

A meta model has the module tree, the names, shapes and types that `from_pretrained` would give, and takes no memory:
parameters and persistent buffers are on the meta device. Buffers that no checkpoint holds (rotary frequencies,
positions) are real and have their true values, since the recording folds them into constants; they and the scheduler's
tables are computed to be the same on every machine (diffkiln.interpreter.portable), here and in modules with weights.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkiln.errors import BuildError, DiffkilnError, SourceError
from diffkiln.guards.building import bounded_building
from diffkiln.guards.limits import active
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.added import finishing
from diffkiln.models.components import Component
from diffkiln.models.folder import CHECKER, IF_READ, LEFT_OUT
from diffkiln.models.gguf import put_gguf
from diffkiln.models.quantized import fill, put_quantized
from diffkiln.models.single_file import load_single_file
from diffkiln.models.source import SourceModel
from diffkiln.models.stand_ins import fill_with_noise
from diffkiln.models.weights import weights_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_BUILD_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def meta_pipeline(source: SourceModel, dtype: str | None = None) -> DiffusionPipeline:
    """Returns the pipeline with real tokenizers and scheduler, and a meta model of every module.

    Args:
        dtype: type of the weights, such as "bfloat16"; None is what each module was saved in.

    Raises:
        SourceError: a configuration does not build its class, or a tokenizer cannot be loaded.
    """
    return pipeline_with(source, {name: _meta_module(source, name, dtype) for name in source.modules})


def pipeline_with(source: SourceModel, modules: Mapping[str, nn.Module]) -> DiffusionPipeline:
    """Returns the pipeline with real tokenizers and scheduler, and with these modules.

    Raises:
        SourceError: a tokenizer cannot be loaded.
    """
    absent = _left_out_arguments(source)
    added = {each.name: (each, modules[each.name]) for each in source.added}
    own = {name: module for name, module in modules.items() if name not in added}
    with quiet_libraries(), _blamed("the pipeline"), portable():
        parts = {name: _part(source, name) for name in source.elsewhere if name not in source.modules}
        given = {**own, **parts, **absent}
        pipe = source.pipeline_class.from_pretrained(source.folder, local_files_only=True, **given)
    return finishing(pipe, added) if added else pipe


def _part(source: SourceModel, name: str) -> Any:
    """Returns a component that is not a module, such as a tokenizer, from its own folder."""
    part = source.components[name]
    return part.kind.from_pretrained(part.root, local_files_only=True)


def _meta_module(source: SourceModel, name: str, dtype: str | None) -> nn.Module:
    module = emptied(skeleton(source, name, dtype))
    if name in source.gguf:
        put_gguf(module, name, source.gguf[name])
    _put_layers(module, source.components[name], data=False)
    return module


def _put_layers(module: nn.Module, component: Component, *, data: bool) -> None:
    """Gives a module the layers that were quantized before."""
    if component.quantized is not None and component.saved is not None:
        put_quantized(module, component.name, component.root, component.saved, component.quantized, data=data)


def skeleton(source: SourceModel, name: str, dtype: str | None = None) -> nn.Module:
    """Builds the module as `from_pretrained` does, with final types, parameters on the meta device, and real buffers.

    Raises:
        SourceError: the configuration does not build its class.
    """
    component = source.components[name]
    build_type = _build_type(source, name, dtype)
    with quiet_libraries(), _blamed(f"component {name}"), _default_dtype(build_type):
        module = _bare(component, build_type)
    final = _transformers_types(module, build_type)
    if component.library == "diffusers":
        final = _diffusers_types(source, name, module, build_type)
    replace_weights(module, lambda key, tensor: tensor.to(final(key, tensor)))
    active().check("source_bytes", sum(tensor.nbytes for _, tensor in weights_of(module)), f"component {name}")
    return module.eval().requires_grad_(False)


def _bare(component: Component, build_type: torch.dtype) -> nn.Module:
    """Returns a module as its configuration builds it, or a bag of such; its parameters are on the meta device."""
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights
    from transformers.initialization import no_init_weights as no_init_of_transformers

    folder, kind = component.root, component.kind
    with torch.random.fork_rng(devices=[]):
        empty, bounded = init_empty_weights(include_buffers=False), bounded_building(f"component {component.name}")
        if component.members:
            members = [_bare(member, build_type) for member in component.members]
            with empty:
                return kind(members)
        if component.build is not None:
            return component.build(False).to(build_type)
        with bounded, no_init_weights(), no_init_of_transformers(), empty, portable():
            if component.library == "transformers":
                config = kind.config_class.from_pretrained(folder, local_files_only=True)
                module = kind._from_config(config, dtype=build_type)
            else:
                module = kind.from_config(kind.load_config(folder, local_files_only=True))
    if component.library == "transformers":
        module.tie_weights()
    return module


def load_module(source: SourceModel, name: str, dtype: str | None = None) -> nn.Module:
    """Loads the module with its weights on the CPU, in evaluation mode and without gradients. Draws them for an
    architecture.

    Raises:
        SourceError: the weights do not fit the configuration.
    """
    if (seed := source.seed_of(name)) is not None:
        return _drawn(skeleton(source, name, dtype), seed)
    if name in source.gguf:
        module = skeleton(source, name, dtype)
        replace_weights(module, lambda _, tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
        put_gguf(module, name, source.gguf[name])
        return module
    component = source.components[name]
    if component.quantized is not None and component.saved is not None:
        module = skeleton(source, name, dtype)
        _put_layers(module, component, data=True)
        found = fill(module, name, component.root, component.saved)
        replace_weights(module, lambda key, tensor: found.get(key, tensor))
        return module.eval().requires_grad_(False)
    build_type = _build_type(source, name, dtype)
    with quiet_libraries(), _blamed(f"component {name}"), portable():
        if component.members:
            module = component.kind([_loaded(member, build_type) for member in component.members])
        else:
            module = _loaded(component, build_type)
    return module.eval().requires_grad_(False)


def _loaded(component: Component, build_type: torch.dtype) -> nn.Module:
    """Returns a module as its library loads it."""
    if component.build is not None:
        return component.build(True).to(build_type)
    if component.file is not None:
        return load_single_file(component.name, component.kind, component.root, component.file, build_type)
    options: dict[str, Any] = {"dtype" if component.library == "transformers" else "torch_dtype": build_type}
    if component.variant:
        options["variant"] = component.variant
    kind: Any = component.kind
    module, info = kind.from_pretrained(
        component.root, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    missing = sorted(set(info["missing_keys"]) & {key for key, _ in module.named_parameters()})
    if missing:
        raise SourceError(
            f"component {component.name}: its weights lack {len(missing)} tensors, the first is {missing[0]}"
        )
    return module


def _drawn(module: nn.Module, seed: str) -> nn.Module:
    replace_weights(module, lambda _, tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    fill_with_noise(module, seed)
    return module


def refuse_nonfinite(module: nn.Module, name: str, when: str = "") -> None:
    """Searches the weights of the component `name` for NaN and infinity; skips weights without data.

    Raises:
        BuildError: there is one; the message names the tensor, and `when` it was looked for.
    """
    for key, tensor in weights_of(module):
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.itemsize == 1:  # float8 has no reductions
            tensor = tensor.to(torch.float32)
        # NaN reaches both ends, and no temporary is needed.
        low, high = torch.aminmax(tensor)
        if not (low.isfinite() and high.isfinite()):
            count = int((~tensor.isfinite()).sum())
            why = "The checkpoint is damaged, or its values do not fit into the type that it is loaded in"
            if when:
                why = "They do not fit into the type that a pass gave them: cast to bfloat16, or leave the layer out"
            raise BuildError(
                f"component {name}: {count} of the {tensor.numel()} values of {key} are NaN or infinite"
                f"{f' {when}' if when else ''}. {why}"
            )


def _build_type(source: SourceModel, name: str, dtype: str | None) -> torch.dtype:
    wanted = dtype or source.dtypes[name]
    if wanted not in _BUILD_TYPES:
        raise SourceError(f'component {name} was saved in {wanted}. Give "dtype" in the source, such as "bfloat16"')
    return _BUILD_TYPES[wanted]


#: Gives the type that the tensor of this name has after loading.
_Types = Callable[[str, torch.Tensor], torch.dtype]


def _transformers_types(module: nn.Module, build_type: torch.dtype) -> _Types:
    """Returns types as transformers 5 casts them: the build type, and float32 for modules that ask for it.

    `_keep_in_fp32_modules` counts for float16 only, `_keep_in_fp32_modules_strict` for bfloat16 too.
    """
    kept: set[str] = set()
    if build_type == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if build_type in (torch.float16, torch.bfloat16):
        kept |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    pattern = re.compile("|".join(glob.replace("*", ".*") for glob in sorted(kept)) or r"(?!)")

    def final(key: str, tensor: torch.Tensor) -> torch.dtype:
        return torch.float32 if tensor.is_floating_point() and pattern.search(key) else tensor.dtype

    return final


def _diffusers_types(source: SourceModel, name: str, module: nn.Module, build_type: torch.dtype) -> _Types:
    """Returns types as diffusers casts them: the type asked for, or float32 for tensors that it keeps."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    checkpoint = source.components[name].checkpoint
    buffers = {key for key, _ in module.named_buffers()}

    def final(key: str, tensor: torch.Tensor) -> torch.dtype:
        saved = checkpoint.tensors.get(key) if checkpoint else None
        if saved is not None and "float" not in saved.dtype:
            return getattr(torch, saved.dtype)
        if not tensor.is_floating_point() or (checkpoint and saved is None and key in buffers):
            return tensor.dtype  # not in the checkpoint: as it was built
        return torch.float32 if kept & set(key.split(".")) else build_type

    return final


def emptied(module: nn.Module) -> nn.Module:
    """Removes the data of every parameter and persistent buffer, and returns the module."""
    replace_weights(module, lambda _, tensor: tensor.to("meta"))
    return module


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Makes every parameter and persistent buffer of a meta model a fake tensor that pretends to lie on the CPU, in
    place.

    Only a recording needs that: it is slower than the meta device, and knows devices.
    """
    replace_weights(module, lambda _, tensor: _fake(tensor, mode))


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    made: Any
    if is_traceable_wrapper_subclass(tensor):
        names, storage = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: _fake(getattr(tensor, name), mode) for name in names}
        made = type(tensor).__tensor_unflatten__(parts, storage, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    else:
        made = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
    # A parameter, as nn.Parameter makes of it; its constructor goes through the dispatcher several times.
    made._is_param = isinstance(tensor, nn.Parameter)
    return made


def replace_weights(module: nn.Module, make: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Replaces every parameter and persistent buffer by `make(name, tensor)`; tied ones stay tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # holds the old ones too, so that no id is given twice
    for path, part in module.named_modules():
        persistent = {key: b for key, b in part._buffers.items() if key not in part._non_persistent_buffers_set}
        for key, tensor in (part._parameters | persistent).items():
            if tensor is None:
                continue
            if id(tensor) not in made:
                new = make(f"{path}.{key}" if path else key, tensor)
                if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=False)
                made[id(tensor)] = (tensor, new)
            home = part._parameters if key in part._parameters else part._buffers
            home[key] = made[id(tensor)][1]  # pyright: ignore[reportArgumentType]


def _left_out_arguments(source: SourceModel) -> dict[str, Any]:
    """Returns arguments that make the pipeline do without the components that are left out."""
    parameters = inspect.signature(source.pipeline_class).parameters
    absent: dict[str, Any] = {}
    for name in (*LEFT_OUT, *IF_READ, "image_encoder", *source.origin.get("without", ())):
        if name in parameters and name not in source.components:
            absent[name] = None
    if "requires_safety_checker" in parameters and CHECKER not in source.components:
        absent["requires_safety_checker"] = False
    return absent


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _blamed(who: str) -> Iterator[None]:
    """Turns the libraries' errors about an unloadable folder into a SourceError."""
    try:
        yield
    except (DiffkilnError, MemoryError):
        raise
    except Exception as error:  # a constructor raises whatever its numbers lead to
        reason = str(error).strip() or type(error).__name__
        raise SourceError(f"{who} cannot be loaded: {reason}") from error
