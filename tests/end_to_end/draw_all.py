"""Run in a fresh process: draw the same requests with several bundles. Prints one line of JSON: the modules imported.

python draw_all.py '{"bundles": {name: path}, "requests": [[prompt, seed], …], "out": folder, "load": {…}}'
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import diffkiln

job = json.loads(sys.argv[1])
for name, bundle in job["bundles"].items():
    pipe = diffkiln.load(bundle, **job.get("load", {}))
    images = [
        pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **job.get("call", {})).images
        for prompt, seed in job["requests"]
    ]
    np.save(Path(job["out"]) / f"{name}.npy", np.concatenate(images))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
