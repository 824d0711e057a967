"""Draw the ten digits with a compiled bundle and save them side by side. Needs the runtime only.

python examples/digits/draw.py BUNDLE OUT.png [--seed N]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import diffkiln

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()

    started = time.perf_counter()
    with diffkiln.load(options.bundle) as pipe:
        loaded = time.perf_counter()
        sheet = Image.new("RGB", (len(WORDS) * SIDE, SIDE))
        for index, word in enumerate(WORDS):
            generator = torch.Generator("cpu").manual_seed(options.seed)
            image = pipe(f"a handwritten {word}", generator=generator).images[0]
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (index * SIDE, 0))
        store = pipe.executor.store
        sheet.save(options.output)
    drawn = time.perf_counter()

    absent = [name for name in ("diffusers", "transformers", "torch._inductor") if name not in sys.modules]
    print(
        f"loaded in {loaded - started:.2f} s, ten digits in {drawn - loaded:.2f} s; not imported: {', '.join(absent)}"
    )
    total = sum(group.nbytes for group in store.groups.values())
    print(f"weights in memory at most {store.bytes_peak / 1e6:.2f} MB of {total / 1e6:.2f} MB")
    print(f"look at {options.output}")


if __name__ == "__main__":
    main()
