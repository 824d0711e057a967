"""Several processes that run one call: their group (`group`), over torch.distributed (`distributed`) or in threads of
one process (`threads`), the watch over the others' lives (`watch`), and the operations that they share
(`operations`)."""

from diffkiln.runtime.processes.agreement import check_mesh, digest_of, mesh_of, together
from diffkiln.runtime.processes.group import Group, Pretended
from diffkiln.runtime.processes.operations import shared_operations
from diffkiln.runtime.processes.started import check_started, is_one_of_several, local_rank

__all__ = [
    "Group",
    "Pretended",
    "check_mesh",
    "check_started",
    "digest_of",
    "is_one_of_several",
    "local_rank",
    "mesh_of",
    "shared_operations",
    "together",
]
