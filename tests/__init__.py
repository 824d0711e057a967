"""Arithmetic that repeats, for every process of a run: this is imported before anything that imports torch.

MKL multiplies otherwise where the rows of a matrix do not begin at a multiple of 16 bytes, so that two equal
computations of one process differ in their last bits. Users run without this setting, which costs up to half the speed.
"""

import os
import sys

REPRODUCIBLE = {"MKL_CBWR": "COMPATIBLE"}

#: Variables that make a CPU look as if it lacked instructions (tests/portable.py).
DISGUISES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "NPY_DISABLE_CPU_FEATURES")

if "torch" in sys.modules and "MKL_CBWR" not in os.environ:
    raise RuntimeError("something imports torch before tests/__init__.py says how it is to compute: set MKL_CBWR")
os.environ |= {name: os.environ.get(name, value) for name, value in REPRODUCIBLE.items()}
