"""How much a bundle, a source or an adapter may take before diffkiln refuses it.

What a stranger wrote may ask for a billion tokens or a million layers. Each such number is compared with a limit before
memory or time is spent on it. The defaults are far above what the largest models of today need, and the user can raise
them: `load(bundle, limits=Limits(operations=1_000_000))`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

from diffkiln.errors import LimitExceeded


@dataclass(frozen=True)
class Limits:
    """The budgets of one load, call or build.

    Attributes:
        memory_bytes: Bytes that the tensors of a program may take at once. None means what the machine has free.
        operations: Operations in the programs of a bundle, those of its components included. 200,000.
        operations_per_call: Operations that one call runs, those of its components at each of their calls. 20,000,000.
        seconds: Seconds that one call may take, looked at between operations. None means no limit.
        variants: Variants of a bundle. 1,024.
        header_rows: Tensors in one file of weights (safetensors or GGUF). 65,536.
        header_bytes: Bytes of the header of one file of weights. 16 MiB.
        json_bytes: Bytes of one JSON file, such as `tokenizer.json` or `config.json`. 64 MiB.
        text_chars: Characters of one prompt, before and after its normalisation. 50,000.
        tokens: Tokens that the prompts of one call are cut or padded to, all rows of a tokenizer together. 262,144.
        modules: Modules that the configuration of a component builds. 20,000.
        buffer_bytes: Bytes of the tables, such as positions, that a configuration computes one at a time. 1 GiB.
        timesteps: Timesteps that a scheduler is trained for. 100,000.
        adapter_rank: Rank of one layer of an adapter. 8,192.
        adapter_bytes: Bytes of an adapter's file that a loaded pipeline is given. 16 GiB.
        gguf_values: Values in the metadata of a GGUF file. 2,000,000.
        regex_seconds: Seconds that the regular expressions of a pass may take for all names. 5.
        source_bytes: Bytes of the weights of a component, as its configuration describes them. 4 TiB.
    """

    memory_bytes: int | None = None
    operations: int = 200_000
    operations_per_call: int = 20_000_000
    seconds: float | None = None
    variants: int = 1_024
    header_rows: int = 65_536
    header_bytes: int = 16 << 20
    json_bytes: int = 64 << 20
    text_chars: int = 50_000
    tokens: int = 262_144
    modules: int = 20_000
    buffer_bytes: int = 1 << 30
    timesteps: int = 100_000
    adapter_rank: int = 8_192
    adapter_bytes: int = 16 << 30
    gguf_values: int = 2_000_000
    regex_seconds: float = 5.0
    source_bytes: int = 4 << 40

    def check(self, name: str, found: float, where: str) -> None:
        """Raises `LimitExceeded` if `found` is more than the limit called `name` allows.

        Args:
            name: A field of this class.
            found: What was asked for, in the field's unit.
            where: The file, the component or the argument that asks for it.
        """
        allowed: float | None = getattr(self, name)
        if allowed is not None and found > allowed:
            raise LimitExceeded(
                f"{where}: {name} is {found:,}, and {allowed:,} is allowed. If you trust its origin, raise "
                f"the limit: limits=Limits({name}={found})"
            )

    def replaced(self, **changes: float | None) -> Limits:
        """Returns these limits with some of them changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


_DEFAULT = Limits()
_active: ContextVar[Limits] = ContextVar("diffkiln_limits", default=_DEFAULT)


def active() -> Limits:
    """Returns the limits of the load, call or build that is going on; the defaults where the user set none."""
    return _active.get()


@contextlib.contextmanager
def applied(limits: Limits | None) -> Iterator[Limits]:
    """Makes `limits` the active ones within the block; None leaves those that are."""
    token = _active.set(limits or _active.get())
    try:
        yield _active.get()
    finally:
        _active.reset(token)
