"""What a file of `aot_inductor` has that its exporter writes and its engine calls."""

from __future__ import annotations

#: A function of an engine for a GPU, void (bool): whether it compares the layouts of tensors with what it assumes.
COMPARE = "diffkiln_compare_layouts"
