"""Regions that are compiled when they are loaded, out of caches that spare the compilation."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffkiln.errors import Incompatible, Incomplete, MissingDependency, VerifyError
from diffkiln.runtime.engines import engine
from diffkiln.runtime.engines import torch_compile as module
from diffkiln.runtime.engines.torch_compile import TorchCompileEngine
from tests.exporters.regions import attending, attending_by_package, built_jit, gated, interpreted, tensors


def loaded() -> tuple:
    region, artefact = built_jit(gated)
    return region, artefact, TorchCompileEngine(artefact.directory, artefact.inputs)


def test_gives_what_the_region_gives():
    region, artefact, run = loaded()
    flat = tensors(region)
    run.check(flat)
    for found, spec, wanted in zip(run(flat), artefact.outputs, interpreted(region, flat), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert found.is_contiguous()
        assert tuple(found.shape) == spec.shape
    with pytest.raises(VerifyError, match="input 0"):
        run.check([flat[0].double(), *flat[1:]])


def test_weights_are_those_of_each_call():
    region, _, run = loaded()
    first, second = tensors(region, 0), tensors(region, 1)
    with torch.inference_mode():
        third = [tensor.clone() for tensor in second]
    for flat in (first, second, [tensor.requires_grad_(tensor.is_floating_point()) for tensor in first], third):
        torch.testing.assert_close(run(flat)[0], interpreted(region, flat)[0].detach(), rtol=1e-4, atol=1e-5)


FRESH = """
import sys, torch
from pathlib import Path
from torch._inductor import cpp_builder

def never(*_):
    raise AssertionError("a compiler was called")

cpp_builder.CppBuilder.build = never
from diffkiln.runtime.engines import engine
from tests.exporters.regions import gated, tensors, interpreted
region, flat = gated(), tensors(gated())
run = engine("torch_compile")(Path(sys.argv[1]), ())
torch.testing.assert_close(run(flat)[0], interpreted(region, flat)[0], rtol=1e-4, atol=1e-5)
"""


def test_fresh_process_calls_no_compiler(tmp_path):
    _, artefact = built_jit(gated)
    moved = shutil.copytree(artefact.directory, tmp_path / "moved")
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    done = subprocess.run([sys.executable, "-c", FRESH, moved], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}


def test_graph_breaks_at_what_is_not_torchs(monkeypatch):
    region, artefact = built_jit(attending_by_package)
    calls = []

    def packaged(op):
        def attend(query, key, value):
            calls.append(op.attrs["kernel"])
            return [torch.nn.functional.scaled_dot_product_attention(query, key, value)]

        return attend

    monkeypatch.setattr(module, "packaged", packaged)
    run = TorchCompileEngine(artefact.directory, artefact.inputs)
    flat = tensors(region)
    torch.testing.assert_close(run(flat)[0], interpreted(attending(), flat)[0], rtol=1e-4, atol=1e-5)
    assert set(calls) == {"flash_2"}


def test_caches_that_do_not_fit_are_told(monkeypatch, caplog):
    _, artefact = built_jit(gated)
    monkeypatch.setattr(module, "compiled", lambda *_, **__: (lambda flat: flat, False))
    with caplog.at_level(logging.WARNING, "diffkiln"):
        TorchCompileEngine(artefact.directory, artefact.inputs)
    assert "compiled again" in caplog.text


def test_missing_compiler_is_named(tmp_path, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def refuse(*_, **__):
        raise InvalidCxxCompiler

    _, artefact = built_jit(gated)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    with pytest.raises(MissingDependency, match=r"needs a C\+\+ compiler"):
        TorchCompileEngine(artefact.directory, artefact.inputs)


def test_missing_file_and_another_device_are_refused(tmp_path):
    _, artefact = built_jit(gated)
    with pytest.raises(Incompatible, match="found meta, required cpu"):
        TorchCompileEngine(artefact.directory, artefact.inputs, "meta")
    with pytest.raises(Incomplete, match=r"options\.json"):
        engine("torch_compile")(Path(tmp_path), ())
