"""The state of a training of factors, in the cache: one file that is replaced whole, or is as good as absent."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from diffkiln.bundle.state import cache_home
from diffkiln.errors import BuildError
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)

#: The directory of the cache that states lie in.
RECOVERED = "recovered"

Pair = tuple[torch.Tensor, torch.Tensor]


class Training:
    """The state of a training: the factors, what the optimizer keeps of each, and its errors.

    Attributes:
        factors: of each layer, float32.
        done: the number of updates that are done.
        moments: the optimizer's two averages of each factor.
        errors: of the answers before the first update and, at the end, after the last one.
    """

    def __init__(self, factors: Mapping[str, Sequence[torch.Tensor]], done: int = 0) -> None:
        self.factors = {name: [each.detach().clone() for each in pair] for name, pair in factors.items()}
        self.done = done
        self.moments: list[Pair] = [(torch.zeros_like(each), torch.zeros_like(each)) for each in self.leaves]
        self.errors: list[float] = []

    @property
    def leaves(self) -> list[torch.Tensor]:
        """Returns the factors in one row."""
        return [each for pair in self.factors.values() for each in pair]


class TrainingFile:
    """The file of a training, in the cache.

    Args:
        key: stands for everything that decides what is trained.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    def read(self) -> Training | None:
        """Returns the training as it was last written; None if there is none, or if it is damaged.

        Raises:
            IntegrityError: the cache belongs to another user, or others may write to it.
        """
        directory = cache_home().existing(RECOVERED)
        path = directory / self._name if directory is not None else None
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts.pop("sha256") != _digest(tensors, facts):
                raise ValueError("its numbers are not those that were written")
            return _from_tensors(tensors, facts)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("the state of a training, %s, is damaged, so it begins anew: %s", path, error)
            return None

    def write(self, training: Training) -> None:
        """Replaces the file by the state of now.

        Raises:
            BuildError: the cache cannot be written.
        """
        tensors = _as_tensors(training)
        facts = {"done": training.done, "errors": training.errors}
        data = save(tensors, {"training": json.dumps(facts | {"sha256": _digest(tensors, facts)})})
        directory = cache_home().directory(RECOVERED)
        staged = directory / f".{secrets.token_hex(16)}"
        try:
            _replace(directory / self._name, staged, data)
        except OSError as error:
            raise BuildError(
                f"the state of a training cannot be written to {directory}: {error.strerror or error}. Set "
                "DIFFKILN_CACHE_DIR to a directory that can"
            ) from error

    @property
    def _name(self) -> str:
        return f"{self._key}.safetensors"


def _replace(path: Path, staged: Path, data: bytes) -> None:
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def _as_tensors(training: Training) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    names = [f"{name}.{part}" for name in training.factors for part in ("down", "up")]
    for name, leaf, (first, second) in zip(names, training.leaves, training.moments, strict=True):
        tensors |= {f"{name}.now": leaf.detach(), f"{name}.first": first, f"{name}.second": second}
    return tensors


def _from_tensors(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Training:
    layers = dict.fromkeys(name.removesuffix(".down.now") for name in tensors if name.endswith(".down.now"))
    pairs = {name: (tensors[f"{name}.down.now"], tensors[f"{name}.up.now"]) for name in layers}
    training = Training(pairs, int(facts["done"]))
    parts = [f"{name}.{part}" for name in layers for part in ("down", "up")]
    training.moments = [(tensors[f"{name}.first"], tensors[f"{name}.second"]) for name in parts]
    training.errors = [float(error) for error in facts["errors"]]
    return training


def _digest(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
