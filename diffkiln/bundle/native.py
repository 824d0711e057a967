"""What a shared object of an engine has that its exporter writes and the runtime calls."""

from __future__ import annotations

#: A function of an engine for a GPU, void (bool): whether it compares the layouts of tensors with what it assumes.
COMPARE = "diffkiln_compare_layouts"
