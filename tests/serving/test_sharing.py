"""Processes that share weights: what they draw, and how much memory they have together."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffkiln

#: A process that loads a bundle, draws, and tells of its memory once all have drawn.
REPLICA = """
import hashlib, json, sys
import torch, diffkiln
with diffkiln.load(sys.argv[1], share_weights=sys.argv[2] == "share") as pipe:
    generator = torch.Generator("cpu").manual_seed(7)
    image = pipe("a handwritten seven", generator=generator).images[0]
    print(hashlib.sha256(image.tobytes()).hexdigest(), pipe.executor.store.bytes_now, flush=True)
    sys.stdin.readline()
    print(json.dumps(open("/proc/self/smaps").read()), flush=True)
    sys.stdin.readline()
"""


def proportional(smaps: str, directory: Path) -> tuple[int, int, int]:
    """Returns PSS, RSS and private dirty bytes of the files of a directory that a process has mapped."""
    totals = [0, 0, 0]
    counts = False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = str(directory) in line
        elif counts:
            name, _, value = line.partition(":")
            if name in ("Pss", "Rss", "Private_Dirty"):
                totals[("Pss", "Rss", "Private_Dirty").index(name)] += int(value.split()[0]) * 1024
    return totals[0], totals[1], totals[2]


def replicas(bundle: Path, share: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", REPLICA, str(bundle), share]
    return [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]


@pytest.mark.more
@pytest.mark.slow
def test_two_replicas_hold_one_copy_of_the_weights(drawing, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(tmp_path))
    with diffkiln.load(drawing) as pipe:
        image = pipe("a handwritten seven", generator=torch.Generator("cpu").manual_seed(7)).images[0]
    started = replicas(drawing, "share")
    try:
        drawn = [each.stdout.readline().split() for each in started]
        for each in started:
            print(file=each.stdin, flush=True)
        maps = [json.loads(each.stdout.readline()) for each in started]
    finally:
        for each in started:
            each.communicate("\n", timeout=30)
    assert [digest for digest, _ in drawn] == [hashlib.sha256(np.asarray(image).tobytes()).hexdigest()] * 2
    weights = int(drawn[0][1])
    parts = [proportional(each, tmp_path / "weights") for each in maps]
    for share, resident, dirty in parts:
        assert resident >= 0.9 * weights  # all of them are mapped
        assert share <= 0.55 * resident  # half of it is the other's
        assert dirty == 0
    assert sum(share for share, _, _ in parts) <= 1.1 * weights + (1 << 16)


def test_an_adapter_changes_the_weights_of_its_own_process(drawing, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(tmp_path))

    def draw(pipe):
        return np.asarray(pipe("a seven", generator=torch.Generator("cpu").manual_seed(7)).images[0])

    with diffkiln.load(drawing, share_weights=True) as first, diffkiln.load(drawing, share_weights=True) as second:
        key = next(key for key in first.executor.store.groups if key[0] == "transformer")
        tensor, other = (pipe.executor.store.get(key)["proj_out.weight"] for pipe in (first, second))
        before = other.clone()
        tensor.mul_(2.0)
        assert torch.equal(other, before)
        assert not np.array_equal(draw(first), draw(second))
        copies = sorted(tmp_path.joinpath("weights").iterdir())
        assert len(copies) == len({group.file for group in first.executor.store.groups.values()})
