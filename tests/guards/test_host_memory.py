"""Memory of this process, as the kernel tells it."""

from __future__ import annotations

from diffkiln.guards.host_memory import forget_highest, highest, present, return_memory

PIECE = 64 * 2**20


def test_the_highest_is_forgotten_and_found_again() -> None:
    held = bytearray(PIECE)
    held[::4096] = b"x" * len(held[::4096])
    assert highest() >= present() > PIECE
    del held
    return_memory()
    before = highest()
    forget_highest()
    assert present() <= highest() < before
