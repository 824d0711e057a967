"""A server that loads a pipeline, perhaps calls it, and forks workers, as gunicorn does with `preload`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Of a busy machine; a worker that waits for ever is ended before.
_SECONDS = 600

_SERVER = """
import hashlib, os, signal, sys, threading
import torch
import diffkiln

bundle, when, workers = sys.argv[1], sys.argv[2], 2
torch.set_num_threads(2)
pipe = diffkiln.load(bundle, allow_native=True)

def draw():
    torch.randn(600, 600) @ torch.randn(600, 600)  # as other parts of a server do: with OpenMP's threads
    image = pipe("a handwritten seven", generator=torch.Generator("cpu").manual_seed(7)).images[0]
    return hashlib.sha256(image.tobytes()).hexdigest()

def work(results):
    signal.alarm(240)  # whoever waits for ever is ended
    results.write(f"{os.getpid()} {draw()} {draw()} {torch.get_num_threads()}\\n")
    results.flush()
    signal.alarm(0)

def called_in_a_thread():
    def callback(*_):
        inside.set()
        going.wait()
        return {}
    pipe("a handwritten seven", callback_on_step_end=callback)

inside, going = threading.Event(), threading.Event()
if when == "called":
    work(sys.stdout)
    sys.stdout.flush()
if when == "calling":
    thread = threading.Thread(target=called_in_a_thread)
    thread.start()
    inside.wait()
read, write = os.pipe()
children = []
for _ in range(workers):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(write, "w") as results:
                work(results)
            status = 0
        finally:
            os._exit(status)
    children.append(child)
os.close(write)
statuses = [os.waitpid(child, 0)[1] for child in children]
print(os.fdopen(read).read(), end="")
going.set()
if when == "calling":
    thread.join()
work(sys.stdout)
pipe.close()
sys.exit(any(statuses))
"""


def served(bundle: Path, when: str) -> list[list[str]]:
    """What parent and children drew: process, two digests, threads."""
    command = [sys.executable, "-c", _SERVER, str(bundle), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
