"""What a bundle says of its processes, and what its programs share among them: both must be the same mesh."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from diffkiln.bundle import Manifest
from diffkiln.errors import ManifestInvalid, PeerLost
from diffkiln.program import FROM_FIRST, SHARED, Mesh, Op, Program
from diffkiln.runtime.processes.group import Group


def mesh_of(manifest: Manifest) -> Mesh | None:
    """Returns the processes that run a bundle's calls together; None for one."""
    counts: Any = manifest.runtime.get("parallel")
    return Mesh(counts) if counts else None


def check_mesh(mesh: Mesh | None, programs: Iterable[Program]) -> None:
    """Checks that programs share their work among the processes that the manifest names.

    Raises:
        ManifestInvalid: an operation is for another number of processes.
    """
    for program in programs:
        for op in program.ops:
            if op.name not in SHARED:
                continue
            count, found, along = op.attrs["count"], *_processes(op, mesh or Mesh({}))
            if found != count:
                raise ManifestInvalid(
                    f"program {program.name!r} shares {op.outputs[0]} among {count} processes{along}, and the manifest "
                    f"names {found}"
                )


def _processes(op: Op, mesh: Mesh) -> tuple[int, str]:
    """Returns how many processes of a mesh share an operation, and along which axis in words."""
    if op.name == FROM_FIRST:
        return mesh.size, ""
    return mesh.count(op.attrs["axis"]), f" along {op.attrs['axis']}"


def digest_of(program: Program, inputs: Sequence[Any]) -> bytes:
    """Returns 32 bytes that differ for other programs and other inputs."""
    digest = hashlib.sha256(program.name.encode())
    for item in inputs:
        if isinstance(item, torch.Tensor):
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(item).encode())
    return digest.digest()


@contextlib.contextmanager
def together(group: Group | None) -> Iterator[None]:
    """Has the other processes end their call, too, where this one's ends with an error inside the `with` block."""
    if group is None:
        yield
        return
    try:
        yield
        group.settle()
    except PeerLost:
        raise
    except BaseException as error:
        group.fail(f"{type(error).__name__}: {error}")
        raise
