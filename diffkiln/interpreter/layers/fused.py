"""Projections that diffusers fuses into one matrix: which they are, and in which rows each lies."""

from __future__ import annotations

#: Name of the fused layer → names of the layers whose rows it has, in order.
FUSED: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def first_row(part: int, parts: int, rows: int, total: int) -> int | None:
    """Returns the row of a fused matrix at which one of its parts begins; None if the part does not fit.

    Keys and values, the last two parts, have the same number of rows. Queries may have more.

    Args:
        part: index of the part.
        parts: how many there are: two, or three.
        rows: of the part.
        total: rows of the fused matrix.
    """
    if part == parts - 3:  # queries
        return 0 if 0 < rows < total and (total - rows) % 2 == 0 else None
    queries = total - 2 * rows
    if rows < 1 or queries < 0 or (queries > 0) != (parts == 3):
        return None
    return total - (parts - part) * rows
