"""What the whole run shares: a state directory of its own, the engine cache, and bundles that are compiled once."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests import DISGUISES, REPRODUCIBLE
from tests.exporters.regions import engine_cache

DIGITS = Path(__file__).parents[1] / "examples" / "digits"


def pytest_configure(config):
    """Engines that are built once are shared by the processes of a run, if the run has several."""
    if "DIFFKILN_TEST_CACHE" not in os.environ:
        os.environ["DIFFKILN_TEST_CACHE"] = tempfile.mkdtemp(prefix="diffkiln-test-")
        atexit.register(shutil.rmtree, os.environ["DIFFKILN_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def disguised():
    """A CPU that is made to look like another (tests/portable.py) has no AVX-512, for those who ask the system, too."""
    if not any(name in os.environ for name in DISGUISES):
        yield
        return
    import torch

    from diffkiln.runtime import compatibility

    flags = frozenset(flag for flag in compatibility._cpu_flags() if not flag.startswith("avx512"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compatibility, "_cpu_flags", lambda: flags)
        patch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """Receipts, locks and policy of the run, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def _compiled(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An example's bundle, compiled by whichever process of the run asks first. To the others it is a stranger's, as
    receipts are kept apart, until they are given one."""
    import diffkiln
    from diffkiln.bundle import open_bundle, write_receipt

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    output = shared / f"compiled-{name}" / "bundle"
    with FileLock(shared / f"compiled-{name}.lock"):
        if not output.exists():
            output.parent.mkdir(exist_ok=True)
            return diffkiln.compile(DIGITS / f"{name}.json", output, cache=engine_cache()).path
    with open_bundle(output) as bundle:
        write_receipt(bundle.id)
    return output


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory) -> Path:
    """examples/digits/spec.json: float32, fused, compiled, offloaded in groups."""
    return _compiled("spec", tmp_path_factory)


@pytest.fixture(scope="session")
def digits_int8_bundle(tmp_path_factory) -> Path:
    """examples/digits/spec-int8.json: the same with int8 weights."""
    return _compiled("spec-int8", tmp_path_factory)


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Path:
    """Where tiny pipelines are saved, each once."""
    return tmp_path_factory.mktemp("families")


_KEPT = ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "HOME", "OMP_WAIT_POLICY", *REPRODUCIBLE, *DISGUISES)


@pytest.fixture
def production(tmp_path) -> dict[str, str]:
    return environment_of_production(tmp_path)


def environment_of_production(room: Path) -> dict[str, str]:
    """The environment of a machine that serves: no compiler on the PATH, empty compiler caches."""
    empty = room / "no-programs"
    empty.mkdir()
    caches = {name: room / name.lower() for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")}
    for path in caches.values():
        path.mkdir()
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"PATH": str(empty), "OMP_NUM_THREADS": "1"} | {name: str(path) for name, path in caches.items()}
