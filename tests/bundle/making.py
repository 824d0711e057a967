"""A small bundle with a file of each role, for the tests."""

from __future__ import annotations

import os
from pathlib import Path

from diffkiln.bundle import (
    AppliedPass,
    BundleWriter,
    EngineEntry,
    FileEntry,
    GroupEntry,
    Manifest,
    Pipeline,
    Requires,
    TensorSpec,
    Variant,
)

CONFIG = "pipeline/model_index.json"
PROGRAM = "programs/v0.json"
WEIGHTS = "weights/transformer/0.safetensors"
NATIVE = "engines/cpu/transformer/Block/model.so"
DOC = "calibration/transformer.json"
ENGINE = "engines/cpu/transformer/Block"

CONTENT: dict[str, tuple[str, bytes]] = {
    CONFIG: ("config", b'{"a": 1}'),
    PROGRAM: ("program", b'{"ops": []}'),
    WEIGHTS: ("weights", bytes(range(256)) * 64),
    NATIVE: ("native", b"\x7fELF" + bytes(5000)),
    f"{ENGINE}/inner/kernel.cubin": ("native", b"cubin" * 100),
    DOC: ("doc", b"read me"),
}


def manifest_of(files: tuple[FileEntry, ...] = ()) -> Manifest:
    named = {row.path for row in files}
    leaf = TensorSpec(dtype="float32", shape=(1, 16), stride=(16, 1))
    return Manifest(
        source={"model": "tiny", "digest": "00", "scale": 0.5},
        requires=Requires(python=">=3.11", torch="==2.13.*", cpu_isa="x86-64-v3", packages={"torch": ">=2.13"}),
        pipeline=Pipeline(
            class_name="FluxPipeline",
            diffusers_version="0.42.1",
            variants=(
                Variant(name="v0", fixed={"height": 64}, programs={"call": PROGRAM} if PROGRAM in named else {}),
            ),
        ),
        files=files,
        engines=(
            EngineEntry(
                target="cpu",
                component="transformer",
                region="Block",
                backend="aot_inductor",
                path=ENGINE,
                inputs=(leaf, leaf),
                outputs=(leaf,),
            ),
        ),
        passes=(AppliedPass(name="fuse_qkv", version=1, options={"component": "transformer"}, changed=True),),
        runtime={"offload": None},
        weights={"transformer": (GroupEntry(name="0", file=WEIGHTS, tensors=1, bytes=16384),)}
        if WEIGHTS in named
        else {},
    )


def fill(writer: BundleWriter, extra: bytes = b"") -> None:
    for path, (role, data) in CONTENT.items():
        if role == "weights":
            writer.path(path).write_bytes(data)
            writer.add(path, "weights")
        else:
            writer.write(path, data + (extra if role == "doc" else b""), role)  # pyright: ignore[reportArgumentType]
    writer.write_unhashed("build.json", b"{}")


def make(output: Path, extra: bytes = b"", force: bool = False) -> str:
    with BundleWriter(output, force=force) as writer:
        fill(writer, extra)
        return writer.publish(manifest_of)


def left_beside(output: Path) -> list[str]:
    return sorted(entry.name for entry in output.parent.iterdir() if entry.name != output.name)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def make_for(output: Path, targets: tuple[str, ...], extra: bytes = b"") -> str:
    """A bundle with one engine, of made-up bytes, for each of the targets; none gives one of data alone."""
    files = {path: item for path, item in CONTENT.items() if item[0] != "native"}
    files |= {f"engines/{target}/transformer/Block/model.so": ("native", target.encode() * 9) for target in targets}

    def manifest(rows: tuple[FileEntry, ...]) -> Manifest:
        made = manifest_of(rows)
        (row,) = made.engines
        engines = [
            row.model_copy(update={"target": target, "path": f"engines/{target}/transformer/Block"})
            for target in targets
        ]
        runtime = {"device": "cpu", "targets": {target: target.removeprefix("cpu-") for target in targets}}
        return made.model_copy(update={"engines": tuple(engines), "runtime": runtime})

    with BundleWriter(output) as writer:
        for path, (role, data) in files.items():
            writer.write(path, data + (extra if role == "weights" else b""), role)  # pyright: ignore[reportArgumentType]
        writer.write_unhashed("build.json", b"{}")
        return writer.publish(manifest)
