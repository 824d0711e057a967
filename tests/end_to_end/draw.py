"""Run in a fresh process: load a bundle, draw, and tell what happened. Prints one line of JSON.

python draw.py '{"bundle": …, "requests": [[prompt, seed], …], "out": …, "repeat": 0, "load": {…}}'
"""

import json
import os
import sys
import time

started: list[str] = []
_PROCESSES = {"subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork", "os.forkpty", "pty.spawn"}
sys.addaudithook(lambda event, _: started.append(event) if event in _PROCESSES else None)

begun = time.perf_counter()
import diffkiln  # noqa: E402
from diffkiln.runtime.engines.aot_inductor import AotInductorEngine  # noqa: E402
from diffkiln.runtime.engines.onnx.engine import OnnxEngine  # noqa: E402


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


calls = 0


def count(kind) -> None:
    run = kind.__call__

    def counted(self, flat):
        global calls
        calls += 1
        return run(self, flat)

    kind.__call__ = counted


count(AotInductorEngine)
count(OnnxEngine)
job = json.loads(sys.argv[1])
pipe = diffkiln.load(job["bundle"], **job.get("load", {}))
loaded = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


def draw(prompt: str, seed: int):
    generator = torch.Generator("cpu").manual_seed(seed)
    images = {keyword: Image.open(file) for keyword, file in job.get("images", {}).items()}
    return pipe(prompt, generator=generator, output_type="np", **job.get("call", {}), **images).images


images = np.concatenate([draw(prompt, seed) for prompt, seed in job["requests"]])
if job.get("out"):
    np.save(job["out"], images)

memory = []
for index in range(job.get("repeat", 0)):
    draw(*job["requests"][index % len(job["requests"])])
    memory.append(resident())

store = getattr(getattr(pipe, "executor", None), "store", None)
print(
    json.dumps(
        {
            "class": type(pipe).__name__,
            "processes": started,
            "engine_calls": calls,
            "modules": sorted({name.partition(".")[0] for name in sys.modules}),
            "inductor": "torch._inductor" in sys.modules,
            "load_seconds": loaded - begun,
            "memory": memory,
            "store": store
            and {
                "groups": len(store.groups),
                "largest": max(group.nbytes for group in store.groups.values()),
                "groups_peak": store.groups_peak,
                "bytes_peak": store.bytes_peak,
                "bytes_now": store.bytes_now,
                "brought": store.brought,
                "total": sum(group.nbytes for group in store.groups.values()),
            },
        }
    )
)
