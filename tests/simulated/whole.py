"""Whole calls of a bundle on a simulated device: weights come by its queues, and operations run in their order.

The bundle is for the CPU, and so are the results of operations. What the simulated device has is the weights: a weight
that an operation reads before it was waited for is poison, and the picture another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffkiln.program.streaming import Arena
from diffkiln.runtime import arrival, loading
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.weights import WeightStore
from tests.simulated.device import Simulated


@contextmanager
def weights_on(device: Simulated, instead: Mapping[str, Any] | None = None, own: Sequence[str] = ()) -> Iterator[None]:
    """Puts weights of bundles on a simulated device. Loading and calling them belong into the `with` block.

    Args:
        instead: how they are offloaded, as JSON: empty for not at all. By default as the bundle says.
        own: components whose engines wait for the device themselves.
    """

    def store(
        verified: Any, groups: Any, place: torch.device, offload: Any, arena: Arena | None = None, **_: Any
    ) -> WeightStore:
        policy = offload if instead is None else (instead or None)
        return WeightStore(verified, groups, device.device, policy, on=device, arena=arena)

    def policy_of(*given: Any) -> Any:
        streams = instead is not None and instead.get("strategy") == "stream"
        return dict(instead or {}) if streams else policy(*given)

    def engines(*given: Any) -> dict[tuple[str, str], Any]:
        found = opened(*given).items()
        return {key: engine if key[0] in own else _Launched(engine, device, key[1]) for key, engine in found}

    def call(executor: Executor, *given: Any, **named: Any) -> list[torch.Tensor]:
        with _Launching(device):
            return run(executor, *given, **named)

    opened, run, policy = loading.open_engines, Executor.__call__, loading.offload_policy
    with (
        mock.patch.object(arrival, "WeightStore", store),
        mock.patch.object(loading, "open_engines", engines),
        mock.patch.object(loading, "offload_policy", policy_of),
        mock.patch.object(Executor, "__call__", call),
    ):
        yield


class _Launching(TorchDispatchMode):
    """Launches each operator on the device before it runs on the CPU."""

    def __init__(self, device: Simulated) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not is_view(func, args):
            self._device.reach(str(func), _tensors((args, kwargs)))
        return func(*args, **(kwargs or {}))


class _Launched:
    """An engine that is launched on the device before it runs on the CPU."""

    def __init__(
        self, engine: Callable[[list[torch.Tensor]], list[torch.Tensor]], device: Simulated, name: str
    ) -> None:
        self._engine, self._device, self._name = engine, device, name

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        self._device.reach(self._name, flat)
        return self._engine(flat)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def is_view(func: Any, args: Sequence[Any]) -> bool:
    """Returns True if an operator reads nothing: the store takes views of a group as soon as it is on its way."""
    if func in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return args[0].is_contiguous()
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _tensors(given: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
