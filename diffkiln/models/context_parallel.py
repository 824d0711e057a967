"""diffusers' own context parallelism: a model of its classes whose tokens several processes share."""

from __future__ import annotations

import os
from typing import Any

import torch

from diffkiln.errors import Incompatible


def processes_started() -> int:
    """Returns how many processes torchrun has started; 1 where it has not."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def check_alone(what: str) -> None:
    """Raises `Incompatible` in one of several processes, for what diffusers cannot do there."""
    if (count := processes_started()) > 1:
        raise Incompatible(
            f"{count} processes were started, and diffusers has no way to {what}. "
            "Load the bundle without as_diffusers, or in one process"
        )


def share_context(module: Any, name: str, count: int) -> None:
    """Has several processes share a model's tokens, as `enable_parallelism` of diffusers does. Each makes every call.

    Args:
        module: of diffusers, with its weights.
        name: what the pipeline calls it.
        count: the processes, which are all that were started.

    Raises:
        Incompatible: another number of processes was started, or diffusers cannot share this class among processes.
    """
    kind = type(module).__name__
    if count != processes_started():
        raise Incompatible(
            f"{processes_started()} processes were started, and as_diffusers shares the tokens of {name} among "
            f"{count}. Start {count}, or one alone"
        )
    if getattr(module, "_cp_plan", None) is None:
        raise Incompatible(
            f"diffusers cannot share {kind} among processes: the class has no plan for it. Load the bundle without "
            "as_diffusers, or in one process"
        )
    try:
        from diffusers.models._modeling_parallel import ContextParallelConfig
    except ImportError as error:
        raise Incompatible("this diffusers has no context parallelism. Install a newer one") from error
    device = next(iter(module.parameters())).device
    _join(device)
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (1, count), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=count, mesh=mesh)
    if device.type == "cpu":
        _resolve_on_cpu(module, config, mesh)
    try:
        module.enable_parallelism(config=config)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise Incompatible(f"diffusers cannot share {kind} among processes: {str(error)[:300]}") from error


def _join(device: torch.device) -> None:
    """Joins the processes that torchrun has started, unless the caller has done so."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _resolve_on_cpu(module: Any, config: Any, mesh: Any) -> None:
    """Has diffusers take this configuration as it is: it would divide by the number of accelerators, which is none."""
    from diffusers.models._modeling_parallel import ParallelConfig

    def resolved(_given: Any) -> Any:
        del module._resolve_parallel_config
        whole = ParallelConfig(context_parallel_config=config)
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        whole.setup(rank, size, torch.device("cpu"), mesh=mesh)
        module._parallel_config = whole
        return whole

    module._resolve_parallel_config = resolved
