"""What each way needs before its first process: a bundle, an export, an environment of its own.

    python prepare.py KIND PIPELINE SOURCE TARGET

KIND is `source`, one of `BUNDLES`, or a peer that exports SOURCE in the environment that this is run in.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: The packages of each peer that has an environment of its own.
#: optimum-intel and optimum-onnx hold diffusers and transformers back, each in its own way.
PEERS: Mapping[str, tuple[str, ...]] = {
    "openvino": ("optimum-intel[openvino]==2.2.*", "openvino==2026.4.*", "diffusers", "accelerate"),
    "onnxruntime": ("optimum-onnx[onnxruntime]", "onnxruntime", "diffusers", "accelerate"),
}
#: Bundles by what compiles them: None is what suits a pipeline best, else every component whole by that backend.
BUNDLES: Mapping[str, str | None] = {"bundle": None, "bundle_openvino": "openvino"}
#: What is said of each: the versions that decide.
_TOLD = ("torch", "diffusers", "transformers", "openvino", "optimum-intel", "optimum-onnx", "onnxruntime")


def python_of(way: str, folder: Path) -> Path:
    """Returns the interpreter of a way, and makes its environment if need be."""
    if way not in PEERS:
        return Path(sys.executable)
    home = folder / f"env-{way}"
    python = home / "bin" / "python"
    if not (home / ".made").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[way]], check=True)
        (home / ".made").touch()
    return python


def versions(python: Path) -> str:
    """Returns the versions that an environment has, of the packages that decide."""
    code = (
        "import importlib.metadata as m\n"
        f"for name in {_TOLD!r}:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return ", ".join(found.splitlines())


def compile_bundle(source: Path, target: Path, call: Mapping[str, Any], passes: list[dict[str, Any]]) -> None:
    """Compiles the saved pipeline for the CPU level of this machine that most have."""
    import diffkiln

    known = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    inputs = {name: call[name] for name in known if name in call}
    inputs["call"] = {name: value for name, value in call.items() if name not in known}
    spec = {
        "spec_version": 1,
        "source": {"model": str(source), "dtype": "float32"},
        "target": {"device": "cpu", "isa": "x86-64-v3"},
        "inputs": inputs,
        "passes": passes,
    }
    diffkiln.compile(spec, target)


def export(way: str, source: Path, target: Path) -> None:
    """Exports for OpenVINO or ONNX Runtime, with the weights as they are."""
    if way == "openvino":
        from optimum.intel import OVDiffusionPipeline

        pipe = OVDiffusionPipeline.from_pretrained(source, export=True, compile=False, load_in_8bit=False)
    else:
        from optimum.onnxruntime import ORTDiffusionPipeline

        pipe = ORTDiffusionPipeline.from_pretrained(source, export=True)
    pipe.save_pretrained(target)


def main() -> None:
    kind, name, source, target = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    if kind in PEERS:
        export(kind, source, target)
        return
    import_module("tests")  # whose tokenizers the sources have; it must come before torch
    from pipelines import MID, save

    if kind == "source":
        save(name, target)
    else:
        backend = BUNDLES[kind]
        passes = MID[name].passes if backend is None else MID[name].whole(backend)
        compile_bundle(source, target, MID[name].call, passes)


if __name__ == "__main__":
    main()
