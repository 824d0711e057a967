"""Engines for GPUs that are not there, run on the CPU: `make test-more`, and all of them by `make test-twin`.

    region ──Inductor──▶ C++ + Triton kernels ──cuda──▶ the engine
                               │
                               └──this folder──▶ its twin: the same C++ for the CPU, the kernels in Triton's interpreter

A twin makes the engine's calls in the engine's order, with its grids, arguments, buffers and views. What differs is
said in `stand_in.h` (the driver) and in `interpreting.py` (the GPU's arithmetic). Kernels run one program after the
other, so races between the programs of a kernel are not seen; nor is anything of the assembler.

Two processes, since Triton must know when it is imported whether it compiles or interprets:

    python -m tests.twins.building FOLDER CASE...      writes each case's twin
    python -m tests.twins.running FOLDER [MISTAKE]     runs one, and compares it with the replay of its region
"""
