"""Add LoRA adapters to a component's weights."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import LimitExceeded, Problem, SourceError
from diffkiln.guards.limits import active
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.checkpoint import read_header
from diffkiln.models.licences import CARD
from diffkiln.models.opening import COMMIT, HUB_ID, from_the_hub
from diffkiln.passes.base import Fact, ModelPass, Pass, State
from diffkiln.passes.layers import has_no_data
from diffkiln.spec import Conflict, Strict, Target, refuse

#: layer, what of the adapter, after the library's own conversion.
_KEY = re.compile(r"(?P<layer>.+?)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lokr_\w+)(\.|$)")


#: Names of the two factors of a layer's change, in the formats that diffusers reads; the rank is a dimension of each.
_RANK_FIRST, _RANK_SECOND = re.compile(r"lora_A|lora_down|[._]down\b"), re.compile(r"lora_B|lora_up|[._]up\b")


class Adapter(Strict):
    """One adapter: a safetensors file, of this machine or of a repository on the Hub."""

    file: Annotated[str, Field(min_length=1)] = Field(
        description="A safetensors file: a path, relative to the spec, or its name in the repository."
    )
    repo: str | None = Field(
        default=None, description="Repository on the Hub that holds the file. Absent: the file is local."
    )
    revision: str | None = Field(default=None, description="Commit of the repository, 40 hexadecimal digits.")
    scale: Annotated[float, Field(ge=-100, le=100)] = Field(
        1.0, description="Factor by which the adapter is multiplied before it is added."
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        repo, revision, file = given.get("repo"), given.get("revision"), given.get("file")
        if isinstance(file, str) and not file.endswith(".safetensors"):
            hint = "Save the adapter as safetensors; loading a pickle can run code that it carries"
            yield ("file",), refuse("is no safetensors file", hint)
        if isinstance(repo, str) and not HUB_ID.fullmatch(repo):
            yield ("repo",), refuse(f"{repo!r} is no repository id such as owner/name")
        if repo is not None and (not isinstance(revision, str) or not COMMIT.fullmatch(revision)):
            yield ("revision",), refuse("must be the commit of the repository, 40 hexadecimal digits, to stay exact")
        if repo is None and revision is not None:
            yield ("revision",), refuse("only a repository has revisions", 'Remove it, or add "repo"')


@dataclass(frozen=True)
class _Found:
    """An adapter's file on this machine."""

    path: Path
    digest: str


class FuseLoRA(ModelPass):
    """Add one or several LoRA adapters to a component's weights, as diffusers' `fuse_lora` does.

    What the adapters were is not in the bundle, only their sum. An adapter that changes text encoders too is fused into
    each by an entry of its own.
    """

    name: ClassVar[str] = "fuse_lora"
    summary: ClassVar[str] = "add LoRA adapters to a component's weights"
    before: ClassVar = {
        "*": "an adapter is added to the original weights, by their names and shapes",
        "cast": "an adapter is added at the precision that the weights were saved in",
    }
    requires_not: ClassVar = {
        "quantized": "an adapter is added to the original weights. Put fuse_lora before quantize",
        "qkv_fused": "an adapter names the projections that fuse_qkv deletes. Put fuse_lora before fuse_qkv",
        "gguf": "a GGUF file has quantized weights, which nothing can be added to. Give the original weights",
    }
    needs_all: ClassVar[str] = "adds adapters by a library that wants all weights at once"
    examples: ClassVar = (
        {"name": "fuse_lora", "component": "unet", "adapters": [{"file": "detail.safetensors", "scale": 0.8}]},
    )

    adapters: Annotated[tuple[Adapter, ...], Field(min_length=1, strict=False)] = Field(
        description="Adapters to add, each with its scale."
    )

    _found: tuple[_Found, ...] = PrivateAttr(default=())
    _pipeline_class: Any = PrivateAttr(default=None)

    def provides(self) -> Iterable[Fact]:
        return [Fact("lora_fused", self.component, self.name)]

    def options(self) -> dict[str, Any]:
        """The options as JSON, with the files' digests in the place of local paths."""
        written = super().options()
        for row, found in zip(written["adapters"], self._found, strict=False):
            row["digest"] = found.digest
            if row["repo"] is None:
                del row["file"], row["repo"], row["revision"]
        return written

    def origins(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Each adapter as `options` states it, with its file on this machine."""
        for row, found in zip(self.options()["adapters"], self._found, strict=True):
            yield row, found.path

    def prepare(self, base: Path, pipeline_class: type) -> Pass:
        ready = self.model_copy()
        ready._pipeline_class = pipeline_class
        ready._found = tuple(_find(adapter, base) for adapter in self.adapters)
        return ready

    # -- checks --

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if find_spec("peft") is None:
            yield Problem(
                where, "peft is not installed, which adds adapters to weights", "pip install 'diffkiln[lora]'"
            )
            return
        if not callable(getattr(self._pipeline_class, "lora_state_dict", None)):
            yield Problem(where, f"diffusers loads no adapters into a {state.class_name}", "Remove it.")
            return
        for index, found in enumerate(self._found):
            place = f"{where}.adapters[{index}]"
            try:
                layers, others = self._layers(module, found)
            except (LimitExceeded, MemoryError):
                raise
            except Exception as error:  # whatever diffusers' conversion raises for a file that it does not know
                reason = f"{found.path.name} is no adapter that diffusers reads: {type(error).__name__}: {error}"
                yield Problem(place, reason)
                continue
            if not layers:
                has = f"it has some for {', '.join(others)}" if others else "it has none for any component"
                yield Problem(place, f"{found.path.name} has no weights for {self.component}; {has}", "Remove it.")
            elif wrong := _misfits(module, layers):
                yield Problem(
                    place,
                    f"{len(wrong)} of the {len(layers)} layers that {found.path.name} changes are not those of "
                    f"{type(module).__name__}, such as {wrong[0]}: it was made for another architecture",
                    "Give an adapter that was trained on this model.",
                )

    def _layers(
        self, module: torch.nn.Module, found: _Found
    ) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
        """What an adapter changes of the component, layer → part → shape; and for which other components it is."""
        state, _, _ = self._state(module, found)
        own = {key.removeprefix(f"{self.component}."): t for key, t in state.items() if _of(key, self.component)}
        others = sorted({key.partition(".")[0] for key in state if not _of(key, self.component)})
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, tensor in _as_peft(module, own).items():
            match = _KEY.match(key)
            layer, part = (match["layer"], match["part"]) if match else (key, "")
            layers.setdefault(layer, {})[part] = tuple(tensor.shape)
        return layers, others

    def _state(self, module: torch.nn.Module, found: _Found) -> tuple[dict[str, Any], Any, Any]:
        """The adapter as diffusers reads it: its tensors, the alphas of an older format, its metadata."""
        read = self._pipeline_class.lora_state_dict
        options: dict[str, Any] = {"weight_name": found.path.name, "local_files_only": True, "use_safetensors": True}
        parameters = inspect.signature(inspect.unwrap(read)).parameters
        if "return_alphas" in parameters:
            options["return_alphas"] = True
        if "unet_config" in parameters and self.component == "unet":
            options["unet_config"] = module.config
        check_adapter(found.path)
        with quiet_libraries(), _disable_current_modes():  # the tensors of the file are real, also beside meta models
            state, *rest = read(str(found.path.parent), return_lora_metadata=True, **options)
        return state, rest[0] if len(rest) == 2 else None, rest[-1]

    # -- the work --

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        layers = [self._layers(module, found)[0] for found in self._found]
        touched = {name for row in layers for name in row}
        if not any(has_no_data(tensor) for tensor in module.parameters()):
            for adapter, found in zip(self.adapters, self._found, strict=True):
                with quiet_libraries():
                    self._fuse(module, adapter, found)
        return [f"{len(layers)} adapters added to {len(touched)} layers"] if touched else []

    def _fuse(self, module: torch.nn.Module, adapter: Adapter, found: _Found) -> None:
        """Add one adapter, by the library, and take the library's layers out again."""
        from diffusers.utils.peft_utils import recurse_remove_peft_layers
        from peft.tuners.tuners_utils import BaseTunerLayer

        state, alphas, metadata = self._state(module, found)
        options: dict[str, Any] = {"network_alphas": alphas, "adapter_name": self.name, "metadata": metadata}
        if callable(getattr(module, "load_lora_adapter", None)):
            module.load_lora_adapter(state, prefix=self.component, **options)  # type: ignore[operator]
        else:
            load = self._pipeline_class.load_lora_into_text_encoder
            load(state, text_encoder=module, prefix=self.component, **options)
        tuned: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in tuned:
            layer.set_scale(self.name, adapter.scale)
            layer.merge(safe_merge=True, adapter_names=[self.name])
        recurse_remove_peft_layers(module)
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            module.__dict__.pop(attribute, None)
        module.eval().requires_grad_(False)


def _find(adapter: Adapter, base: Path) -> _Found:
    if adapter.repo is not None and adapter.revision is not None:
        with from_the_hub(adapter.repo, adapter.revision, "$.passes"):
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            path = Path(hf_hub_download(adapter.repo, adapter.file, revision=adapter.revision))
            with suppress(EntryNotFoundError):  # the card, for the licence
                hf_hub_download(adapter.repo, CARD, revision=adapter.revision)
    else:
        path = (base / Path(adapter.file).expanduser()).absolute()
    try:
        with path.open("rb") as file:
            return _Found(path, "sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise SourceError(f"the adapter {adapter.file} cannot be read at {path}: {error.strerror}") from error


def check_adapter(path: Path) -> None:
    """Checks a file's header before the library reads all its tensors.

    Raises:
        SourceError: It is no safetensors file.
        LimitExceeded: It has more tensors, or one of a higher rank, than the limits allow.
    """
    for name, tensor in read_header(path).items():
        for place, pattern in enumerate((_RANK_FIRST, _RANK_SECOND)):
            if len(tensor.shape) >= 2 and pattern.search(name):
                active().check("adapter_rank", tensor.shape[place], f"{path.name}, {name}")


def _of(key: str, component: str) -> bool:
    return key.startswith(f"{component}.")


def _as_peft(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The names as they are when diffusers puts them into the module."""
    from diffusers.utils import state_dict_utils as convert

    if not state:
        return state
    if not callable(getattr(module, "load_lora_adapter", None)):
        named = convert.convert_state_dict_to_peft(convert.convert_state_dict_to_diffusers(dict(state)))
        if not hasattr(module, "text_model"):
            named = {key.removeprefix("text_model."): tensor for key, tensor in named.items()}
        return named
    first = next(iter(state))
    if "lora_A" in first or any(".lokr_" in key for key in state):
        return state
    return convert.convert_unet_state_dict_to_peft(dict(state))


def _misfits(module: torch.nn.Module, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
    """The layers that the module does not have, or has in another shape."""
    parts = dict(module.named_modules())
    wrong = []
    for name, shapes in layers.items():
        weight = getattr(parts.get(name), "weight", None)
        if weight is None:
            wrong.append(name)
            continue
        down, up = shapes.get("lora_A"), shapes.get("lora_B")
        if (down and down[1] != weight.shape[1]) or (up and up[0] != weight.shape[0]):
            wrong.append(f"{name} {tuple(weight.shape)}")
    return wrong


PLUGIN = FuseLoRA
