"""The diffusers and transformers modules of a bundle, in the shape in which its passes left them.

Modules are built without initialising anything, their parameters on the meta device, and then given the bundle's
weights. Classes come from diffusers and transformers alone; code that comes with a model is never imported.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffkiln import plugins
from diffkiln.bundle import AppliedPass, GroupEntry, Verified
from diffkiln.bundle.bags import BAGS, member_folder
from diffkiln.bundle.configurations import fetches_code
from diffkiln.bundle.layout import LAYERS
from diffkiln.errors import Incompatible, IntegrityError, MissingDependency, SpecError
from diffkiln.guards.building import bounded_building
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.interpreter.layers import FUSED, put_slots_as_stored, store_as_described
from diffkiln.interpreter.layers.torchao import joined, type_in
from diffkiln.runtime.tables import read_header


def class_of(library: Any, name: Any) -> type:
    """Returns a class that model_index.json names.

    Raises:
        Incompatible: it is of neither diffusers nor transformers, or the installed one lacks it.
    """
    import diffusers
    import transformers

    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, str(library), None)
    if library == "diffusers" and name in BAGS:
        home = importlib.import_module(BAGS[name].home)
    kind = getattr(home, str(name), None) if home is not None else None
    if not isinstance(kind, type) or ".dummy_" in kind.__module__:
        raise Incompatible(f"{library}.{name}: neither the installed diffusers nor transformers has this class")
    if re.match("Auto[A-Z]", str(name)) or fetches_code(kind):
        raise IntegrityError(
            f"{library}.{name}: this class takes code or models from elsewhere, so it is not built for a bundle. Load "
            "the bundle without as_diffusers"
        )
    return kind


def build(
    folder: Path, kind: type, weights: Mapping[str, torch.Tensor], passes: Sequence[AppliedPass]
) -> torch.nn.Module:
    """Builds one module with its weights.

    Args:
        folder: with its config.json, and layers.json where layers are stored in another form.
        kind: its class.
        weights: every tensor of the bundle's for it, by name.
        passes: those that went over it, in order.

    Raises:
        IntegrityError: the bundle lacks a weight that the module has, or holds one that it does not.
    """
    layers = _read_layers(folder)
    module = _skeleton(folder, kind, _build_type(weights, layers))
    for row in passes:
        pass_of(row).restore(module, row.options)
    plain = {_plain(name, module) for name in weights}
    if any(f".{fused}." in name for name in plain - module.state_dict().keys() for fused in FUSED):
        module.fuse_qkv_projections()  # type: ignore[operator]
    try:
        store_as_described(module, layers)
        put_slots_as_stored(module, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(f"{folder.name}/{LAYERS} does not fit {type(module).__name__}: {error}") from None
    _drop_missing(module, {_plain(name, module) for name in weights})
    _put_all(module, _whole(module, weights, passes, folder))
    if empty := [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]:
        raise IntegrityError(f"{folder.name}: the bundle holds no weight {empty[0]!r} ({len(empty)} are missing)")
    return module.eval().requires_grad_(False)


def pass_of(row: AppliedPass) -> Any:
    """Returns the pass of a manifest's row, and of its methods the one that the options name.

    Raises:
        MissingDependency: the distribution that brings the pass is not there.
        Incompatible: this diffkiln has no such method.
    """
    known = plugins.plugins("passes")
    if row.name not in known:
        raise MissingDependency(
            f"this bundle was made with the pass {row.name!r}, and no installed package brings it. Install that "
            "package, or load the bundle without as_diffusers"
        )
    try:
        return known[row.name].load().model_for(row.options)
    except SpecError as error:
        reason = error.problems[0].reason
        raise Incompatible(f"this diffkiln cannot repeat in diffusers what {row.name} did: {reason}") from None


def _read_layers(folder: Path) -> dict[str, Any]:
    file = folder / LAYERS
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise IntegrityError(f"{folder.name}/{LAYERS} is broken: {error}") from None
    if not isinstance(found, dict):
        raise IntegrityError(f"{folder.name}/{LAYERS} is not a table of layers")
    return found


def read_weights(verified: Verified, rows: Sequence[GroupEntry]) -> dict[str, torch.Tensor]:
    """Returns every tensor of these groups, on the CPU, each in memory of its own."""
    tensors: dict[str, torch.Tensor] = {}
    for row in rows:
        entries, offset, _ = read_header(verified, row.file)
        for name, entry in entries.items():
            raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
            if raw.numel():
                verified.read_into(row.file, memoryview(raw.numpy().data), offset + entry.start)
            tensors[name] = entry.of(raw)
    return tensors


def _skeleton(folder: Path, kind: Any, build_type: torch.dtype) -> torch.nn.Module:
    """Returns the module with its parameters on the meta device; buffers that no checkpoint holds are real."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(build_type)
    try:
        return _bag(folder, kind, build_type) if kind.__name__ in BAGS else _bare(folder, kind, build_type)
    finally:
        torch.set_default_dtype(before)


def _bag(folder: Path, kind: Any, build_type: torch.dtype) -> torch.nn.Module:
    """Returns several models in one, each from a folder of its own beside the others."""
    from accelerate import init_empty_weights

    folders = []
    while (beside := folder.parent / member_folder(kind.__name__, folder.name, len(folders))).is_dir():
        folders.append(beside)
    members = [_bare(each, class_of("diffusers", BAGS[kind.__name__].member), build_type) for each in folders]
    with init_empty_weights(include_buffers=False):
        return kind(members)


def _bare(folder: Path, kind: Any, build_type: torch.dtype) -> torch.nn.Module:
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import ModelMixin, no_init_weights
    from transformers.initialization import no_init_weights as no_init_of_transformers

    empty = init_empty_weights(include_buffers=False)
    where = f"component {folder.name}"
    no_init = no_init_weights(), no_init_of_transformers()
    with torch.random.fork_rng(devices=[]), bounded_building(where), no_init[0], no_init[1], empty:
        if issubclass(kind, ModelMixin):
            made: Any = kind
            return made.from_config(made.load_config(folder, local_files_only=True))
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        module = kind._from_config(config, dtype=build_type)
    module.tie_weights()
    return module


def _build_type(weights: Mapping[str, torch.Tensor], layers: Mapping[str, Any]) -> torch.dtype:
    """Returns the floating type of most weights."""
    count: Counter[torch.dtype] = Counter()
    for name, tensor in weights.items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers and leaf.partition("_")[2]:
            if leaf == "weight_data":
                count[dtype_of(layers[layer]["dtypes"]["weight"])] += tensor.numel()
        elif leaf in ("scale", "zero_point"):
            continue  # of quantized weights, with types of their own
        elif tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            count[tensor.dtype] += tensor.numel()
    return count.most_common(1)[0][0] if count else torch.float32


def _plain(name: str, module: torch.nn.Module) -> str:
    """Returns the parameter's name for the name of a tensor inside a quantized one."""
    known = module.state_dict().keys()
    while name not in known and "." in name and not name.endswith((".weight", ".bias")):
        name = name.rpartition(".")[0]
    return name


def _drop_missing(module: torch.nn.Module, names: set[str]) -> None:
    """Removes submodules of which the bundle holds nothing, such as unfused projections that passes deleted."""
    seen = {id(tensor) for name, tensor in module.named_parameters(remove_duplicate=False) if name in names}
    for path, part in list(module.named_modules()):
        for leaf, child in list(part._modules.items()):
            if child is None or not any(True for _ in child.parameters()):
                continue
            prefix = f"{path}.{leaf}." if path else f"{leaf}."
            held = any(name.startswith(prefix) for name in names)
            if not held and not any(id(tensor) in seen for tensor in child.parameters()):
                setattr(part, leaf, None)


def _whole(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], passes: Sequence[AppliedPass], folder: Path
) -> dict[str, torch.Tensor]:
    """Returns the weights put together again from the tensors that they are stored as."""
    known = module.state_dict().keys()
    whole = {name: tensor for name, tensor in weights.items() if name in known}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if name not in known:
            base, _, leaf = name.rpartition(".")
            if base not in known:
                raise IntegrityError(f"the bundle holds a weight {name!r} that {type(module).__name__} does not have")
            parts.setdefault(base, {})[leaf] = tensor
    for base, inner in parts.items():
        whole[base] = _joined(base.rpartition(".")[0], module.get_parameter(base), inner, passes, folder)
    return whole


def _joined(
    layer: str, weight: torch.Tensor, parts: Mapping[str, torch.Tensor], passes: Sequence[AppliedPass], folder: Path
) -> torch.Tensor:
    for row in passes:
        try:
            whole = pass_of(row).restore_weight(layer, weight, parts, row.options)
        except ValueError as error:
            raise Incompatible(str(error)) from None
        if whole is not None:
            return whole
    try:  # as its source had it
        quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
        return joined(weight, parts, *type_in(quantization))
    except (OSError, ValueError, AttributeError):
        reason = f"the bundle holds quantized weights of {layer!r}, which no pass quantized"
        raise IntegrityError(reason) from None
    except ImportError:
        raise MissingDependency("this bundle's weights are torchao's in diffusers: pip install torchao") from None


def _put_all(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Puts weights in their places, and in those of every parameter that is tied to them."""
    holders: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for key, value in table.items():
                holders.setdefault(id(value), []).append((table, key))
    old = module.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        if tuple(old[name].shape) != tuple(tensor.shape):
            raise IntegrityError(
                f"the bundle's weight {name!r} is {tuple(tensor.shape)}, the module's {tuple(old[name].shape)}"
            )
        parameter = isinstance(old[name], torch.nn.Parameter)
        new = torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
        for table, key in holders[id(old[name])]:
            table[key] = new
