"""Run in a fresh process: load a bundle, call it once, keep what it gives and how often engines ran.

python draw.py '{"bundle": path, "keywords": {…}, "images": {…}, "seed": number, "field": "images", "out": path}'
"""

import json
import sys

import torch
from PIL import Image

import diffkiln

job = json.loads(sys.argv[1])
with diffkiln.load(job["bundle"]) as pipe:
    images = {keyword: Image.open(file) for keyword, file in job["images"].items()}
    result = pipe(**job["keywords"], **images, generator=torch.Generator().manual_seed(job["seed"]), output_type="pt")
    engines = len(pipe.executor.engines)
torch.save(result[job["field"]], job["out"])
print(json.dumps({"engines": engines, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
