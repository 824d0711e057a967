"""Runs a twin: `python -m tests.twins.running FOLDER`. Prints a line of JSON, with the error or the fault.

It is judged by the runtime's own self-test: at most twice the error of the replay, against float32.
"""

from __future__ import annotations

from tests.twins import interpreting  # isort: skip  (Triton must know first)

import ctypes
import json
import pickle
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.native import COMPARE
from diffkiln.errors import VerifyError
from diffkiln.exporters.base import input_specs
from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import Program
from diffkiln.runtime.engines.aot_inductor import AotInductorEngine
from diffkiln.runtime.reference import replay_in_float32
from diffkiln.runtime.self_test import Repeated, errors, sample, self_test
from tests.twins.attending import Attend
from tests.twins.memory import Fault
from tests.twins.written import Written

_Launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint32] * 3, ctypes.POINTER(ctypes.c_void_p))
_Attend = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_void_p] * 4, ctypes.c_int32, ctypes.c_double)


class Twin:
    """An engine as the runtime takes one: the twin's library in torch's loader, with its kernels and its attention.

    Args:
        folder: with the library in `engine`, and the kernels' files in `kernels`.
        written: what the engine is run by.
    """

    def __init__(self, folder: Path, written: Written) -> None:
        self.kernels = interpreting.Kernels(folder / "kernels", written.kernels)
        self.attend = Attend(())
        self.fault: Exception | None = None
        self._written = written
        self._engine = AotInductorEngine(folder / "engine", input_specs(written.members[0]))
        self._library = ctypes.CDLL(str(folder / "engine" / "data" / "aotinductor" / "model" / "engine.so"))
        self._functions = _Launch(self._launch), _Attend(self._attend)
        self._library.twin_set(*self._functions)
        self._library[COMPARE](True)

    def check(self, flat: Any) -> None:
        """Takes what the self-test gives; other members have other sizes."""

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        self.fault = None
        try:
            return self._engine(flat)
        except RuntimeError as error:
            raise self.fault or error from error

    def _launch(self, name: bytes, x: int, y: int, z: int, arguments: Any) -> int:
        try:
            kernel = self._written.kernels[name.decode()]
            count = sum(kind != "constexpr" for kind in kernel.signature.values())
            self.kernels(name.decode(), (x, y, z), [arguments[index] for index in range(count)])
            return 0
        except Exception as fault:
            self.fault = fault
            return 1

    def _attend(
        self, kernel: bytes, query: int, key: int, value: int, mask: int | None, causal: int, scale: float
    ) -> int | None:
        try:
            return self.attend(kernel.decode(), (query, key, value, mask), bool(causal), scale)
        except Exception as fault:
            self.fault = fault
            return None


def run(twin: Twin, written: Written, member: int) -> float:
    """Returns a twin's error at one of its sizes.

    Raises:
        Fault: a kernel or a call does what it must not, or is missing.
        VerifyError: the results are wrong.
    """
    region: Program = written.members[member]
    twin.attend = Attend(written.attention[member])
    error = self_test(twin, region, written.constants, torch.device("cpu"), region.name)
    if twin.attend.left:
        raise Fault(f"no call for {twin.attend.left}")
    if idle := [name for name, count in twin.kernels.launched.items() if not count]:
        raise Fault(f"kernels that nobody launches: {', '.join(idle)}")
    return error


def replays_own(region: Program, constants: Mapping[str, torch.Tensor]) -> float:
    """Returns the error of the replay itself, on the tensors of the self-test; 0 where it computes in float32."""
    cpu = torch.device("cpu")
    normal = Repeated(cpu)
    inputs = [sample(item.type, normal) for item in region.inputs]
    weights = {name: sample(region.types[f"@{name}"], normal) for name in region.weights}
    with torch.inference_mode():
        found = Interpreter(region, cpu)(inputs, weights, dict(constants))
        exact = replay_in_float32(region, inputs, weights, constants, cpu)
    return max(errors(want, got).overall for want, got in zip(exact, found, strict=True))


def main(folder: Path) -> None:
    written: Written = pickle.loads((folder / "case.pickle").read_bytes())
    began = time.perf_counter()
    twin = Twin(folder, written)
    result: dict[str, Any] = {"kernels": len(written.kernels), "cubins": written.cubins, "errors": []}
    result["own"] = [replays_own(member, written.constants) for member in written.members]
    try:
        for member in range(len(written.members)):
            result["errors"].append(run(twin, written, member))
    except (Fault, VerifyError, RuntimeError) as fault:
        result["fault"] = str(fault)
    result["launches"] = sum(twin.kernels.launched.values())
    result["seconds"] = time.perf_counter() - began
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
