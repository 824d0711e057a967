"""The gate for exceptions: what leaves a public function is ours, with what it was as its cause."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import Any

import pytest

import diffkiln
from diffkiln import cli
from diffkiln.errors import DiffkilnError, Incompatible, InternalFault, OutOfMemory, SpecError, SystemRefused
from diffkiln.guards.gate import gated


class Panic(BaseException):
    """As pyo3's PanicException, which is no `Exception`."""


@gated("callback")
def raising(error: BaseException | None = None, callback: Any = None) -> Any:
    if callback is not None:
        return callback()
    if error is not None:
        raise error
    return None


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (KeyError("dtype"), InternalFault, "internal fault, KeyError: 'dtype'.*report"),
        (Panic("overflow"), InternalFault, "Panic: overflow"),
        (RecursionError(), InternalFault, "RecursionError"),
        (MemoryError(), OutOfMemory, "too little memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemory, "memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), SystemRefused, r"No space left on device \(/x\)"),
    ],
)
def test_what_is_not_ours_becomes_ours_with_its_cause(error: BaseException, kind: type, says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        raising(error)
    assert isinstance(caught.value, DiffkilnError)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [SpecError("ours"), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), DeprecationWarning("turned on")]
)
def test_ours_and_what_ends_a_program_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        raising(error)
    assert caught.value is error


@pytest.mark.parametrize("by_name", [True, False])
def test_what_the_callers_own_function_raises_comes_back_unchanged(by_name: bool) -> None:
    own = KeyError("of the caller")

    def callback() -> None:
        raise own

    with pytest.raises(KeyError) as caught:
        raising(callback=callback) if by_name else raising(None, callback)
    assert caught.value is own


def test_arguments_that_do_not_fit_the_signature_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        raising(nonsense=1)


def test_out_of_memory_is_a_memory_error_and_no_reason_to_report() -> None:
    assert issubclass(OutOfMemory, MemoryError)
    assert issubclass(OutOfMemory, Incompatible)
    assert "report" not in str(OutOfMemory())


def test_internal_fault_is_70_on_the_command_line(monkeypatch, capsys, tmp_path) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise Panic("attempt to\x1b[2J add with overflow")

    monkeypatch.delenv("DIFFKILN_DEBUG", raising=False)
    monkeypatch.setattr("diffkiln.bundle.open_bundle", broken)
    assert cli.main(["inspect", str(tmp_path)]) == 70
    err = capsys.readouterr().err
    assert "internal fault" in err
    assert "report" in err
    assert "\x1b" not in err


def test_public_functions_pass_the_gate() -> None:
    from diffkiln import bundle, hub
    from diffkiln.compiler.modules import CompiledModule
    from diffkiln.runtime.pipeline import CompiledPipeline

    public = [getattr(diffkiln, name) for name in diffkiln.__all__]
    functions = [each for each in public if callable(each) and not isinstance(each, type)]
    functions += [CompiledPipeline.__call__, CompiledModule.__call__, CompiledModule.save]
    functions += [hub.push, hub.pull, hub.cached, bundle.open_bundle, bundle.Bundle.verify, bundle.sign_bundle]
    for function in functions:
        assert getattr(function, "__wrapped__", None), function


def test_bundle_is_found_by_its_absolute_path_when_the_working_directory_is_gone(tmp_path) -> None:
    code = (
        "import os, sys; os.rmdir(os.getcwd())\n"
        "from diffkiln.bundle import open_bundle\n"
        "try: open_bundle(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(there)], cwd=here, capture_output=True, text=True, check=True
    )
    assert "has no manifest.json" in done.stdout
