"""The manifest, and what stands beside it: `build.json` and the card."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffkiln.bundle import (
    AppliedPass,
    BundleWriter,
    FileEntry,
    Manifest,
    Pipeline,
    Requires,
    device_features,
    device_policy,
)
from diffkiln.bundle.card import card
from diffkiln.bundle.evidence import WORKING_MEMORY
from diffkiln.bundle.layout import BUILD, CARD
from diffkiln.compiler.packed import as_json
from diffkiln.compiler.plan import Plan
from diffkiln.errors import MissingDependency
from diffkiln.models.card import read_card
from diffkiln.passes.base import Pass
from diffkiln.record.pipeline import Recording
from diffkiln.version import __version__


def manifest_of(rows: tuple[FileEntry, ...], plan: Plan) -> Manifest:
    """Returns the manifest of the packed files."""
    import diffusers

    packed, asked = plan.packed, plan.spec.runtime
    offload = asked.offload.model_dump(mode="json", exclude_none=True) if asked.offload else None
    devices = {target.name: target.device for target in plan.targets}
    runtime: dict[str, Any] = {
        **device_policy(devices),
        "offload": offload,
        "on_incompatible": asked.on_incompatible,
        "targets": {target.name: target.isa for target in plan.targets},
    }
    if packed.gpus:
        runtime["gpus"] = {name: dict(row) for name, row in packed.gpus.items()}
    for name in ("cuda_graphs", "tf32"):
        if (value := getattr(asked, name)) is not None:
            runtime[name] = value
    if plan.spec.parallel:
        runtime["parallel"] = plan.spec.parallel
        if plan.spec.shared is not None and plan.spec.shared.first:
            runtime["first"] = sorted(plan.spec.shared.first)
    if plan.recording.reason:
        runtime["only_diffusers"] = plan.recording.reason
    steps = [ran.listed.step for ran in plan.report]
    major, minor = torch.__version__.split(".")[:2]
    return Manifest(
        features_required=device_features(packed.features.union(*(step.features for step in steps)), devices),
        source=plan.source.pinned(),
        requires=Requires(
            python=">=3.11",
            torch=f"=={major}.{minor}.*",
            cuda=packed.requires.get("cuda"),
            driver=packed.requires.get("driver"),
            cpu_isa=min(target.isa for target in plan.targets) if packed.engines else None,
            glibc=packed.requires.get("glibc"),
            packages=_packages(plan.recording, steps),
        ),
        pipeline=Pipeline(
            class_name=plan.source.class_name,
            diffusers_version=diffusers.__version__,
            variants=packed.variants,
        ),
        files=rows,
        engines=packed.engines,
        passes=tuple(
            AppliedPass(name=step.name, version=step.version, options=step.options(), changed=ran.changed)
            for ran in plan.report
            for step in (ran.listed.step,)
        ),
        runtime=runtime,
        weights=dict(packed.weights),
    )


def _packages(recording: Recording, steps: Sequence[Pass]) -> dict[str, str]:
    """Returns the packages that the runtime needs beyond its own: those of passes, and ftfy if prompts are cleaned with
    it.
    """
    needed = {name: versions for step in steps for name, versions in step.packages().items()}
    texts = [text for programs in recording.calls for program in programs.values() for text in program.texts]
    if not any("ftfy" in text["transforms"] for text in texts):
        return needed
    try:
        import ftfy  # noqa: F401
    except ImportError:
        raise MissingDependency("this pipeline mends its prompts with ftfy: pip install ftfy") from None
    return needed | {"ftfy": ">=6.1"}


def pack_report(
    writer: BundleWriter,
    manifest: Manifest,
    plan: Plan,
    seconds: Mapping[str, float],
    ledger: Mapping[str, Any],
    working: Mapping[str, Mapping[str, int]],
) -> None:
    """Writes `build.json` and `README.md`, which differ between builds and are outside the id and the digests.

    Args:
        ledger: what each pass cost, where the spec has gates of quality.
        working: the working memory that was measured, by target.
    """
    import diffusers

    build = {
        "diffkiln": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "host": {"machine": platform.machine(), "system": platform.platform()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1),
        "weights": {name: plan.bytes_before[name] for name in plan.state.modules},
        "passes": [
            {
                "name": ran.listed.step.name,
                "component": ran.listed.step.component,
                "bytes": ran.nbytes,
                "notes": list(ran.notes),
                "seconds": round(ran.seconds, 3),
            }
            for ran in plan.report
        ],
        "notices": list(plan.notices),
        "source": read_card(plan.source.folder, plan.source.origin),
        **({"ledger": ledger} if ledger else {}),
        **({WORKING_MEMORY: {name: dict(row) for name, row in working.items()}} if working else {}),
    }
    writer.write_unhashed(BUILD, as_json(build))
    writer.write_unhashed(CARD, card(manifest, build).encode())
