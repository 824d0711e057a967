"""What caching schedules cost and save on the digits pipeline: score, PSNR and SSIM against eager, seconds an image.

    python benchmarks/schedules.py [--count 100]

Every schedule is drawn replayed and compiled, in this process, on this CPU. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from images import draw, psnr, ssim
from measuring import DIGITS, machine, median, table

sys.path.insert(0, str(DIGITS))

#: What the residual does from step to step; measured by `ratios` on the prompts below.
PROMPTS = [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "four", "five", "six", "seven")]
CALIBRATE = {"name": "calibrate", "component": "transformer", "prompts": "prompts.txt"}


def methods(ratios: list[float]) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """name → options of calibrate, options of cache_schedule."""
    made: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
        "mask of outputs, every second": (None, {"method": "mask", "steps": [1, 0, 1, 0, 1, 0, 1, 0]}),
        "FORA, interval 2": (None, {"method": "fora", "interval": 2}),
        "FORA, interval 3": (None, {"method": "fora", "interval": 3}),
        "first block, interval 2": (None, {"method": "first_block", "interval": 2}),
        "DBCache, 1 in front, 1 in back, interval 2": (None, {"method": "dbcache", "interval": 2, "back": 1}),
        "DBCache, 1 in front, 1 in back, interval 3": (None, {"method": "dbcache", "interval": 3, "back": 1}),
        "MagCache, threshold 0.06": (None, {"method": "magcache", "ratios": ratios, "threshold": 0.06}),
        "MagCache, threshold 0.2": (None, {"method": "magcache", "ratios": ratios, "threshold": 0.2}),
    }
    for order in (0, 1, 2):
        name = f"TaylorSeer of outputs, order {order}, interval 2"
        made[name] = (None, {"method": "taylorseer", "interval": 2, "order": order})
    blocks = {"method": "taylorseer", "interval": 2, "order": 1, "keep": "blocks"}
    made["TaylorSeer of blocks, order 1, interval 2"] = (None, blocks)
    for name, method in (("outputs", "mask"), ("FORA", "fora"), ("DBCache", "dbcache")):
        for computed in (4, 3):
            options = {"method": method, "steps": "calibrated"} | ({"back": 1} if method == "dbcache" else {})
            made[f"{name}, calibrated for {computed} steps"] = ({"computed": computed}, options)
    return made


def ratios(pipe: Any) -> list[float]:
    """How large what the blocks add is against the step before, mean over the prompts: MagCache's own measure."""
    import torch

    sizes: list[list[float]] = []
    net = pipe.transformer
    first, last = net.transformer_blocks[0], net.single_transformer_blocks[-1]
    came: list[torch.Tensor] = []

    def before(_module: Any, _args: Any, kwargs: Any) -> None:
        came.append(kwargs["hidden_states"])

    def after(_module: Any, _args: Any, result: Any) -> None:
        sizes[-1].append(float((result[1] - came.pop()).norm(dim=-1).mean()))

    handles = [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]
    for seed, prompt in enumerate(PROMPTS):
        sizes.append([])
        import evaluate_eager

        pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt", **evaluate_eager.CALL)
    for handle in handles:
        handle.remove()
    mean = torch.tensor(sizes).mean(0)
    return [1.0, *(round(float(ratio), 4) for ratio in mean[1:] / mean[:-1])]


def spec(calibrate: dict[str, Any] | None, schedule: dict[str, Any] | None, compiled: bool) -> dict[str, Any]:
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"] = {**made["source"], "model": str(DIGITS / "model")}
    passes = [{"name": "fuse_qkv", "component": "transformer"}]
    passes += [{**CALIBRATE, **calibrate}] if calibrate else []
    passes += [{"name": "cache_schedule", "component": "transformer", **schedule}] if schedule else []
    passes += [{"name": "compile", "component": "transformer"}] if compiled else []
    return {**made, "passes": passes, "runtime": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    described = machine()

    import classifier
    import evaluate_eager

    import diffkiln
    from diffkiln.bundle import open_bundle
    from diffkiln.cli.printing import schedules
    from diffkiln.program.schedule import line

    wanted = classifier.requests(options.count)
    digits = [request.digit for request in wanted]
    pipe = evaluate_eager.load()
    measured = ratios(pipe)
    eager, seconds = draw(pipe, wanted, **evaluate_eager.CALL)
    score = f"{classifier.score(eager, digits):.2f}"
    rows = [("eager diffusers, float32", "●" * 8, "8", score, "", "", f"{median(seconds) * 1e3:.0f}", "")]
    every: dict[str, Any] = {"none": (None, None), **methods(measured)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("\n".join(PROMPTS))
        for index, (name, (calibrate, schedule)) in enumerate(every.items()):
            times: list[str] = []
            for compiled in (False, True):
                made = spec(calibrate, schedule, compiled)
                built = diffkiln.compile(made, Path(folder) / f"{index}-{compiled}", base=folder)
                with diffkiln.load(built.path) as bundle:
                    bundle(wanted[0].prompt)
                    images, seconds = draw(bundle, wanted)
                times.append(f"{median(seconds) * 1e3:.0f}")
            symbols = "●" * 8
            if schedule:
                with open_bundle(built.path) as opened:
                    (parts,) = schedules(opened).values()
                symbols = line(parts["transformer"])
            quality = (
                f"{classifier.score(images, digits):.2f}",
                f"{psnr(images, eager):.1f}",
                f"{ssim(images, eager):.4f}",
            )
            rows.append((name, symbols, str(symbols.count("●")), *quality, *times))
            print(rows[-1], file=sys.stderr, flush=True)
    print("# Caching schedules of the digits pipeline\n")
    print(described + "\n")
    print(
        f"{options.count} digits, 8 steps, 4 blocks, QKV fused, all weights resident, one image at a time. PSNR and "
        "SSIM against eager, of the compiled bundle. ● computes all blocks, ◐ some, ○ none. Calibrated on 8 prompts "
        f"and seeds that are not among the {options.count}. MagCache's ratios, measured on the same: {measured}.\n"
    )
    columns = ("schedule", "steps", "computed", "score", "PSNR, dB", "SSIM", "ms replayed", "ms compiled")
    print(table(columns, rows))
    print("\nOn a GPU: not measured.")


if __name__ == "__main__":
    main()
