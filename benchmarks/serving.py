"""Requests a second, latencies, overload, memory and a killed replica, on this machine; writes results/serving.md.

python benchmarks/serving.py [--build BUILD] [--only PHASE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from measuring import DIGITS, ROOT, machine, table
from PIL import Image

import diffkiln

PATH = "/v1/images/generations"
CLIENTS, REQUESTS, LONG = 8, 200, 2_000
BATCHES = (1, 2, 4)
#: Seconds of overload.
STORM = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Answered:
    """One answer: when it was asked for and how long it took, in seconds; its status; its seed and file."""

    at: float
    seconds: float
    status: int
    seed: int
    data: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--only", nargs="*", default=list(PHASES))
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    kept = options.build / "found.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    found.setdefault("machine", machine())
    single, batched = compiled(options.build, (1,)), compiled(options.build, BATCHES)
    for name in options.only:
        found[name] = PHASES[name](single, batched)
        print(name, json.dumps(found[name]), flush=True)
        kept.write_text(json.dumps(found, indent=1))
    if set(PHASES) <= set(found):
        (ROOT / "benchmarks" / "results" / "serving.md").write_text(report(found))


def compiled(build: Path, batches: Sequence[int]) -> Path:
    """The digits with compiled blocks, resident, in these batches."""
    output = build / f"digits-{'-'.join(map(str, batches))}"
    if not output.exists():
        spec = json.loads((DIGITS / "spec.json").read_text())
        spec["source"]["model"], spec["runtime"] = str(DIGITS / "model"), {}
        spec["inputs"] = [{**spec["inputs"], "batch_size": batch} for batch in batches]
        diffkiln.compile(spec, output)
    return output


# -- servers --


@contextmanager
def process(*command: str) -> Iterator[tuple[str, int]]:
    """A server in a process, its address and its id. `PORT` in the command is a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.replace("PORT", str(port)) for word in command]
    started = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1_200):
            try:
                if httpx2.get(f"{url}/ready", trust_env=False).status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        yield url, started.pid
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(60)


def serve(bundle: Path, *options: str) -> Any:
    return process("-m", "diffkiln", "serve", str(bundle), "--port", "PORT", "--log-level", "warning", *options)


def prompt(seed: int) -> str:
    return f"a handwritten {WORDS[seed % len(WORDS)]}"


async def ask(client: httpx2.AsyncClient, seed: int) -> Answered:
    at = time.perf_counter()
    answer = await client.post(PATH, json={"prompt": prompt(seed), "seed": seed})
    seconds = time.perf_counter() - at
    data = answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else ""
    return Answered(at, seconds, answer.status_code, seed, data)


def with_client(url: str, work: Callable[[httpx2.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        limits = httpx2.Limits(max_connections=400, max_keepalive_connections=400)
        async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as client:
            return await work(client)

    return asyncio.run(run())


async def closed(client: httpx2.AsyncClient, count: int, clients: int = CLIENTS, after: Any = None) -> list[Answered]:
    """So many clients, each of which sends its next request when it has its answer."""
    seeds, found = iter(range(count)), []

    async def one() -> None:
        for seed in seeds:
            found.append(await ask(client, seed))
            if after is not None:
                after(len(found))

    await asyncio.gather(*[one() for _ in range(clients)])
    return found


class Lean:
    """A client that costs little: in a storm of requests, httpx would take more of the cores than the server does.

    Args:
        url: Of the server.
    """

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def ask(self, seed: int) -> Answered:
        body = json.dumps({"prompt": prompt(seed), "seed": seed}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        at = time.perf_counter()
        reader, writer = await self._connected(at)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", lines)
        assert length is not None, lines
        await reader.readexactly(int(length[1]))
        seconds = time.perf_counter() - at
        if "connection: close" in lines:
            writer.close()
        else:
            self._idle.append((reader, writer, time.perf_counter()))
        return Answered(at, seconds, int(lines.split()[1]), seed, "")

    async def _connected(self, now: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Returns a connection that is idle, or a new one; uvicorn closes those that are idle for five seconds."""
        while self._idle:
            reader, writer, used = self._idle.pop()
            if now - used < 3:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        for _, writer, _ in self._idle:
            writer.close()


def summary(found: Sequence[Answered]) -> dict[str, Any]:
    good = sorted(item.seconds for item in found if item.status == 200)
    ends = max(item.at + item.seconds for item in found)
    cuts = statistics.quantiles(good, n=100, method="inclusive")
    return {
        "requests": len(found),
        "answered": len(good),
        "p50": cuts[49],
        "p95": cuts[94],
        "p99": cuts[98],
        "per_second": len(good) / (ends - min(item.at for item in found)),
    }


def differing(bundle: Path, found: Sequence[Answered]) -> dict[str, Any]:
    """Counts answers that are not the image of their own seed; also returns the largest difference in 255."""
    most, wrong = 0, 0
    with diffkiln.load(bundle) as pipe:
        for item in found:
            generator = torch.Generator("cpu").manual_seed(item.seed)
            alone = np.asarray(pipe(prompt(item.seed), generator=generator).images[0]).astype(int)
            made = np.asarray(Image.open(io.BytesIO(base64.b64decode(item.data)))).astype(int)
            difference = int(abs(alone - made).max())
            most, wrong = max(most, difference), wrong + (difference > 1)
    return {"wrong": wrong, "most": most}


# -- phases --


def one_process(bundle: Path) -> dict[str, Any]:
    with serve(bundle) as (url, _):
        with_client(url, lambda client: closed(client, 16))
        found = with_client(url, lambda client: closed(client, REQUESTS))
    return summary(found) | differing(bundle, found)


def plain(single: Path, _: Path) -> dict[str, Any]:
    """FastAPI and diffusers."""
    with process("benchmarks/peers/plain_server.py", str(DIGITS / "model"), "PORT") as (url, _pid):
        with_client(url, lambda client: closed(client, 8))
        return summary(with_client(url, lambda client: closed(client, REQUESTS)))


def killed(_: Path, batched: Path) -> dict[str, Any]:
    """Two replicas on Ray Serve, one of which is killed at half of the requests."""
    import ray
    from ray import serve as ray_serve
    from ray.serve._private.api import _get_global_client

    from diffkiln.serving.ray import app

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": 8263})
    url, results = "http://127.0.0.1:8263", {}
    ray_serve.run(app(batched, replicas=2), name="digits", route_prefix="/")
    with_client(url, lambda client: closed(client, 16))
    results["whole"] = summary(with_client(url, lambda client: closed(client, REQUESTS)))
    state = _get_global_client().get_serve_details()["applications"]["digits"]["deployments"]["Replica"]
    victim = state["replicas"][0]["pid"]

    def kill(done: int) -> None:
        if done == REQUESTS // 2:
            os.kill(victim, signal.SIGKILL)

    found = with_client(url, lambda client: closed(client, REQUESTS, after=kill))
    results["killed"] = summary(found) | differing(batched, found)
    ray_serve.shutdown()
    ray.shutdown()
    return results


def overload(_: Path, batched: Path) -> dict[str, Any]:
    """Requests at five times the rate that the server keeps up with, whether or not earlier ones are answered."""
    queue = 16
    with serve(batched, "--queue", str(queue)) as (url, pid):
        asyncio.run(_lean(url, 16, CLIENTS))
        unloaded = summary(asyncio.run(_lean(url, 60, 1)))
        capacity = summary(asyncio.run(_lean(url, REQUESTS, CLIENTS)))["per_second"]
        before, own = _seconds_of(pid), time.process_time()
        found = asyncio.run(_storm(url, capacity))
        used, own = _seconds_of(pid) - before, time.process_time() - own
    refused = sorted(item.seconds for item in found if item.status == 429)
    others = {item.status for item in found} - {200, 429}
    return {
        "queue": queue,
        "capacity": capacity,
        "unloaded_p99": unloaded["p99"],
        "bound": 2 * unloaded["p99"] + (queue + BATCHES[-1]) / capacity,
        "refused": len(refused),
        "refused_p99": statistics.quantiles(refused, n=100, method="inclusive")[98],
        "others": sorted(others),
        "load": os.getloadavg()[0],
        "server_cores": used / STORM,
        "client_cores": own / STORM,
        **summary(found),
    }


async def _lean(url: str, count: int, clients: int) -> list[Answered]:
    """Does as `closed`, by the client that costs little."""
    lean, seeds, found = Lean(url), iter(range(count)), []

    async def one() -> None:
        found.extend([await lean.ask(seed) for seed in seeds])

    await asyncio.gather(*[one() for _ in range(clients)])
    lean.close()
    return found


async def _storm(url: str, capacity: float) -> list[Answered]:
    lean, asked, started = Lean(url), [], time.perf_counter()
    for number in range(int(5 * capacity * STORM)):
        await asyncio.sleep(max(0.0, started + number / (5 * capacity) - time.perf_counter()))
        asked.append(asyncio.ensure_future(lean.ask(number)))
    found = await asyncio.gather(*asked)
    lean.close()
    return found


def _seconds_of(pid: int) -> float:
    """Returns the processor time of a process, in seconds."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def memory(_: Path, batched: Path) -> dict[str, Any]:
    """Resident memory of the process every 200 of 2,000 requests."""
    with serve(batched) as (url, pid):
        sizes = []

        def note(done: int) -> None:
            if done % 200 == 0:
                text = Path(f"/proc/{pid}/status").read_text()
                sizes.append(int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024)

        with_client(url, lambda client: closed(client, LONG, after=note))
    return {"megabytes": sizes}


def leaving(_: Path, batched: Path) -> dict[str, Any]:
    """Measures how long an image stays in the pipeline after its client has left, and a step, in seconds."""
    with serve(batched) as (url, _pid), httpx2.Client(base_url=url, trust_env=False) as client:
        seconds, steps = [], []
        for _ in range(10):
            with client.stream("POST", PATH, json={"prompt": "a seven", "stream": True}) as reading:
                times = [time.perf_counter() for line in reading.iter_lines() if line.startswith("data")]
            steps += [later - earlier for earlier, later in itertools.pairwise(times[:-1])]
            with client.stream("POST", PATH, json={"prompt": "a seven", "n": 8, "stream": True}) as reading:
                next(line for line in reading.iter_lines() if line.startswith("data"))
            left = time.perf_counter()
            while not re.search(r"running_images 0\.0", client.get("/metrics").text):
                pass
            seconds.append(time.perf_counter() - left)
    return {"freed": statistics.median(seconds), "slowest": max(seconds), "step": statistics.median(steps)}


PHASES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "plain": plain,
    "single": lambda single, _: one_process(single),
    "batched": lambda _, batched: one_process(batched),
    "ray": killed,
    "overload": overload,
    "memory": memory,
    "leaving": leaving,
}


# -- the page --


def report(found: dict[str, Any]) -> str:
    ways = {
        "FastAPI and diffusers": found["plain"],
        "`diffkiln serve`, batch 1": found["single"],
        "`diffkiln serve`, batches 1, 2 and 4": found["batched"],
        "Ray Serve, 2 replicas": found["ray"]["whole"],
        "Ray Serve, 2 replicas, one killed": found["ray"]["killed"],
    }
    base = found["plain"]["per_second"]
    rows = []
    for name, row in ways.items():
        times = [f"{row[key] * 1e3:.0f}" for key in ("p50", "p95", "p99")]
        speed = [f"{row['per_second']:.1f}", f"{row['per_second'] / base:.1f}"]
        rows.append([name, row["requests"], row["answered"], *times, *speed, row.get("wrong", "not compared")])
    columns = ["server", "requests", "answered", "p50, ms", "p95, ms", "p99, ms", "images a second", "× plain", "wrong"]
    over, sizes, left = found["overload"], found["memory"]["megabytes"], found["leaving"]
    most = max(found[name]["most"] for name in ("single", "batched"))
    most = max(most, found["ray"]["killed"]["most"])
    gain, lead = found["batched"]["per_second"] / found["single"]["per_second"], found["batched"]["per_second"] / base
    lost = found["ray"]["killed"]["requests"] - found["ray"]["killed"]["answered"] + found["ray"]["killed"]["wrong"]
    growth = sizes[-1] - sizes[0]
    goals = [
        ["a killed replica loses or mixes up no answer", f"{lost} of {REQUESTS}", lost == 0],
        ["batching ≥ 1.5 × without", f"{gain:.1f} ×", gain >= 1.5],
        ["≥ 3 × FastAPI and diffusers", f"{lead:.1f} ×", lead >= 3],
        [
            f"5 × overload: p99 of what is accepted ≤ 2 × unloaded p99 + queue ({over['bound'] * 1e3:.0f} ms)",
            f"{over['p99'] * 1e3:.0f} ms",
            over["p99"] <= over["bound"],
        ],
        [
            f"5 × overload: p99 of the {over['refused']} refused ≤ 250 ms",
            f"{over['refused_p99'] * 1e3:.0f} ms",
            over["refused_p99"] <= 0.25,
        ],
        [f"memory constant over {LONG:,} requests", f"{growth:+.1f} MB after the first 200", growth < 0.02 * sizes[0]],
        [
            f"a client that leaves frees its place within a step ({left['step'] * 1e3:.1f} ms) and 20 ms to notice",
            f"{left['freed'] * 1e3:.1f} ms, with the time to ask for it",
            left["freed"] <= left["step"] + 0.02,
        ],
    ]
    judged = [[goal, measured, "met" if met else "missed"] for goal, measured, met in goals]
    megabytes = ", ".join(f"{size:.0f}" for size in sizes)
    return f"""# Serving: requests a second, latencies, overload

{found["machine"]}

examples/digits, float32, 8 steps, resident weights, compiled blocks. {CLIENTS} clients on the same machine and cores
send {REQUESTS} requests in all, each the next when it has its answer; every request has a prompt and a seed of its own.
"Wrong" counts answers that are not the image of their own seed, drawn alone, within one of 255; the largest difference
was {most}.

{table(columns, rows)}

| goal | measured | |
|---|---|---|
{chr(10).join("| " + " | ".join(row) + " |" for row in judged)}

In the overload {over["requests"]} requests came in 8 seconds, five times the {over["capacity"]:.1f} a second that the
server keeps up with; {over["answered"]} were accepted. Statuses other than 200 and 429: {over["others"] or "none"}. The
queue had {over["queue"]} places, and {BATCHES[-1]} more may be in the pipeline: so many are ahead of a request at
most, and the queue's part of the bound is their number divided by that rate. The machine's load
was {over["load"]:.0f}; the server got the time of {over["server_cores"]:.2f} cores, and its client that of
{over["client_cores"]:.2f}.

Resident memory every 200 requests, in MB: {megabytes}.
"""


if __name__ == "__main__":
    main()
