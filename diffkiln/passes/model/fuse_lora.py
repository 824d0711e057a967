"""Add LoRA adapters to a component's weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr

from diffkiln.errors import LimitExceeded, Problem, SourceError
from diffkiln.interpreter.adapters import ENCODERS
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.adapters import as_peft, matches, read_state
from diffkiln.models.checkpoint import read_header
from diffkiln.models.licences import CARD
from diffkiln.models.opening import COMMIT, HUB_ID, from_the_hub
from diffkiln.passes.base import Fact, ModelPass, Pass, State
from diffkiln.passes.layers import has_no_data
from diffkiln.spec import Conflict, Spec, Strict, Target, refuse

if TYPE_CHECKING:
    from diffkiln.record.pipeline import Recording

#: layer, what of the adapter, after the library's own conversion.
_KEY = re.compile(r"(?P<layer>.+?)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lokr_\w+)(\.|$)")


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

    ignore: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="Tensors of the file that are left out on purpose: patterns of their names, such as `lora_te*`.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        repo, revision, file = given.get("repo"), given.get("revision"), given.get("file")
        if given.get("scale") == 0:
            yield ("scale",), refuse("an adapter times 0 changes nothing", "Remove the adapter, or give it a scale")
        if isinstance(file, str) and not file.endswith(".safetensors"):
            hint = "Save the adapter as safetensors; loading a pickle can run code that it carries"
            yield ("file",), refuse("is not a safetensors file", hint)
        if isinstance(repo, str) and not HUB_ID.fullmatch(repo):
            yield ("repo",), refuse(f"{repo!r} is not a repository id such as owner/name")
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

    The bundle holds only the sum of weights and adapters. An adapter that also changes text encoders needs an entry for
    each of them.
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
        """Returns the options as JSON, with the files' digests instead of local paths."""
        written = super().options()
        for row, found in zip(written["adapters"], self._found, strict=False):
            row["digest"] = found.digest
            if row["ignore"] is None:
                del row["ignore"]
            if row["repo"] is None:
                del row["file"], row["repo"], row["revision"]
        return written

    def origins(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Yields each adapter as `options` states it, with its file on this machine."""
        for row, found in zip(self.options()["adapters"], self._found, strict=True):
            yield row, found.path

    def prepare(self, base: Path, pipeline_class: type) -> Pass:
        ready = self.model_copy()
        ready._pipeline_class = pipeline_class
        ready._found = tuple(_find(adapter, base) for adapter in self.adapters)
        return ready

    # -- checks --

    def check_beside(self, spec: Spec, others: Sequence[Pass], where: str) -> Iterable[Problem]:
        """Yields what the files hold for components that no pass gives them to."""
        loaded = getattr(self._pipeline_class, "_lora_loadable_modules", ())
        fused = {
            (step.component, found.digest) for step in others if isinstance(step, FuseLoRA) for found in step._found
        }
        for index, (adapter, found) in enumerate(zip(self.adapters, self._found, strict=True)):
            for component, keys in foreign_keys(found.path, self.component, adapter.ignore or ()).items():
                if component in loaded and (component, found.digest) not in fused:
                    hint = (
                        f'Add {{"name": "fuse_lora", "component": "{component}", "adapters": […]}} with it, or leave '
                        f'them out: "ignore": ["{_pattern(keys)}"].'
                    )
                    yield Problem(f"{where}.adapters[{index}]", _left_out(found, keys, component), hint)

    def notices(self, recording: Recording, compiled: Collection[str]) -> Iterable[str]:
        """Yields what the files hold for components into which diffusers loads no adapters."""
        loaded = getattr(self._pipeline_class, "_lora_loadable_modules", ())
        for adapter, found in zip(self.adapters, self._found, strict=True):
            for component, keys in foreign_keys(found.path, self.component, adapter.ignore or ()).items():
                if component not in loaded:
                    yield f"{_left_out(found, keys, component)}, into which diffusers loads none"

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
            path = f"{where}.adapters[{index}]"
            try:
                layers, others, warnings = self._layers(module, found, self.adapters[index].ignore or ())
            except (LimitExceeded, MemoryError):
                raise
            except Exception as error:  # whatever diffusers' conversion raises for a file that it does not know
                reason = f"{found.path.name} is not an adapter that diffusers reads: {type(error).__name__}: {error}"
                yield Problem(path, reason)
                continue
            if not layers:
                has = f"it has some for {', '.join(others)}" if others else "it has none for any component"
                yield Problem(path, f"{found.path.name} has no weights for {self.component}; {has}", "Remove it.")
            elif wrong := _misfits(module, layers):
                yield Problem(
                    path,
                    f"{len(wrong)} of the {len(layers)} layers that {found.path.name} changes are not those of "
                    f"{type(module).__name__}, such as {wrong[0]}: it was made for another architecture",
                    "Give an adapter that was trained on this model.",
                )
            else:
                yield from _unread(found, layers, warnings, self.adapters[index].ignore or (), path)

    def _layers(
        self, module: torch.nn.Module, found: _Found, ignored: Sequence[str] = ()
    ) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str], Sequence[str]]:
        """Returns an adapter's changes to the component, layer → part → shape, the other components it is for, and what
        diffusers warns of."""
        state, _, _, warnings = self._state(module, found, ignored)
        own = {key.removeprefix(f"{self.component}."): t for key, t in state.items() if _of(key, self.component)}
        others = sorted({key.partition(".")[0] for key in state if not _of(key, self.component)})
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, tensor in _as_peft(module, own).items():
            match = _KEY.match(key)
            layer, part = (match["layer"], match["part"]) if match else (key, "")
            layers.setdefault(layer, {})[part] = tuple(tensor.shape)
        return layers, others, warnings

    def _state(
        self, module: torch.nn.Module, found: _Found, ignored: Sequence[str]
    ) -> tuple[dict[str, Any], Any, Any, Sequence[str]]:
        """Returns the adapter as diffusers reads it: its tensors, the alphas of an older format, its metadata, and the
        warnings."""
        config = module.config if self.component == "unet" else None
        found_state = read_state(self._pipeline_class, found.path, ignored, config)
        return dict(found_state.tensors), found_state.alphas, found_state.metadata, found_state.warnings

    # -- the work --

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        pairs = zip(self.adapters, self._found, strict=True)
        layers = [self._layers(module, found, adapter.ignore or ())[0] for adapter, found in pairs]
        touched = {name for row in layers for name in row}
        if not any(has_no_data(tensor) for tensor in module.parameters()):
            for adapter, found in zip(self.adapters, self._found, strict=True):
                with quiet_libraries():
                    self._fuse(module, adapter, found)
        return [f"{len(layers)} adapters added to {len(touched)} layers"] if touched else []

    def _fuse(self, module: torch.nn.Module, adapter: Adapter, found: _Found) -> None:
        """Adds one adapter, by the library, and removes the library's layers again."""
        from diffusers.utils.peft_utils import recurse_remove_peft_layers
        from peft.tuners.tuners_utils import BaseTunerLayer

        state, alphas, metadata, _ = self._state(module, found, adapter.ignore or ())
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


_ENCODERS = re.compile(r"text_encoder(?:_\d)?(?=\.)")


def foreign_keys(file: Path, component: str, ignored: Sequence[str] = ()) -> dict[str, list[str]]:
    """Returns the tensors of an adapter's file that are of text encoders other than `component`, by theirs."""
    found: dict[str, list[str]] = {}
    for key in sorted(read_header(file)):
        named = _ENCODERS.match(key)
        owner = next((name for begin, name in ENCODERS.items() if key.startswith(begin)), named[0] if named else "")
        if owner and owner != component and not matches(key, ignored):
            found.setdefault(owner, []).append(key)
    return found


def _pattern(keys: Sequence[str]) -> str:
    named = _ENCODERS.match(keys[0])
    return f"{named[0]}.*" if named else next(f"{begin}*" for begin in ENCODERS if keys[0].startswith(begin))


def _left_out(found: _Found, keys: Sequence[str], component: str) -> str:
    return f"{found.path.name} has {len(keys)} tensors for {component}, such as {keys[0]}, which are left out"


def _unread(
    found: _Found, layers: Mapping[str, Mapping[str, Any]], warnings: Sequence[str], ignored: Sequence[str], where: str
) -> Iterator[Problem]:
    """Yields what diffusers leaves out of an adapter's file when it reads it."""
    magnitudes = [key for key in sorted(read_header(found.path)) if "dora_scale" in key and not matches(key, ignored)]
    if magnitudes and not any("lora_magnitude_vector" in parts for parts in layers.values()):
        reason = (
            f"diffusers leaves out {len(magnitudes)} tensors of {found.path.name}, such as {magnitudes[0]}: it reads"
        )
        hint = (
            "Save it by peft, whose lora_magnitude_vector is read, or do without them, as diffusers does: "
            '"ignore": ["*dora_scale"].'
        )
        yield Problem(where, f"{reason} no magnitudes of DoRA in this format", hint)
    for warning in dict.fromkeys(line for line in warnings if "dora_scale" not in line):
        yield Problem(where, f"diffusers warns of {found.path.name}: {' '.join(warning.split())[:200]}")
    unpaired = [name for name, parts in layers.items() if ("lora_A" in parts) != ("lora_B" in parts)]
    if unpaired:
        reason = f"{len(unpaired)} layers of {found.path.name} have one of their two factors, such as {unpaired[0]}"
        yield Problem(where, reason, "The file is not whole: get it again.")


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


def _of(key: str, component: str) -> bool:
    return key.startswith(f"{component}.")


def _as_peft(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Returns the names that diffusers uses in the module."""
    named = as_peft(state, encoder=not callable(getattr(module, "load_lora_adapter", None)))
    if callable(getattr(module, "load_lora_adapter", None)) or hasattr(module, "text_model"):
        return named
    return {key.removeprefix("text_model."): tensor for key, tensor in named.items()}


def _misfits(module: torch.nn.Module, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[str]:
    """Returns the layers that the module does not have, or has in another shape."""
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
