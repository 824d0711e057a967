"""Tiles that the memory decides: none where the whole image fits, else the largest that do."""

from __future__ import annotations

import re
from typing import Any

import pytest

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler.compile import plan_memory_of
from diffkiln.errors import IllegalPlan, SpecError
from tests.passes.test_cache_schedule import draw
from tests.passes.test_vae import with_vae
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
#: The constants of a bundle lie in a file, whose header a spec does not have.
HEADERS = 4096
WHERE = r"\$\.passes\[0\]"


def spec(families, limit: int | None = None, **options: Any) -> dict[str, Any]:
    """A FLUX whose decoder takes the most: 64 × 64 pixels, in tiles of 32 or as a whole."""
    made = with_vae(families, "flux", **options)
    made["inputs"] |= {"height": 64, "width": 64}
    made["passes"] = made["passes"] if options else []
    if limit:
        made["runtime"] = {"offload": {"strategy": "auto", "max_memory": str(limit)}}
    return made


def least(families, **options: Any) -> int:
    """The smallest limit that a spec's call keeps, in bytes."""
    with pytest.raises(IllegalPlan) as caught:
        plan_memory_of(spec(families, 1000, **options))
    required = re.findall(r"required ([\d,]+)", str(caught.value))[0]
    return int(required.replace(",", "")) + HEADERS


@pytest.fixture(scope="module")
def limits(families) -> tuple[int, int]:
    """The smallest limit in tiles of 32 pixels, and the smallest for the whole image."""
    return least(families, tiling=True, tile=32), least(families)


def test_tiles_take_less(limits):
    in_tiles, whole = limits
    assert in_tiles < 0.8 * whole


@pytest.mark.parametrize(("at", "tile"), [(0, 32), (1, None)])
def test_the_bundle_has_the_largest_tiles_that_fit(at, tile, limits, families, tmp_path):
    built = diffkiln.compile(spec(families, limits[at], tiling="auto"), tmp_path / "bundle")
    (notice,) = [each for each in built.notices if "that fits the memory" in each]
    assert notice.startswith(f"$.passes[0]: {f'tiles of {tile} pixels' if tile else 'no tiles'}, the first of 14 ways")
    with open_bundle(built.path) as bundle:
        (row,) = [each for each in bundle.manifest.passes if each.name == "vae"]
    assert (row.options["tiling"], row.options.get("tile")) == (True if tile else "auto", tile)
    plain = spec(families, tiling=True, tile=32) if tile else spec(families)
    with diffkiln.load(built.path) as pipe, diffkiln.load(diffkiln.compile(plain, tmp_path / "plain").path) as other:
        assert (draw(pipe, plain) == draw(other, plain)).all()


def test_what_fits_in_no_tiles_is_refused_with_the_least_that_does(limits, families):
    with pytest.raises(IllegalPlan, match=r"max_memory: found 1,000 bytes, required"):
        plan_memory_of(spec(families, 1000, tiling="auto"))


def test_without_a_bound_there_is_nothing_to_decide_by(families):
    for way in (diffkiln.check, plan_memory_of):
        with pytest.raises(
            IllegalPlan, match=WHERE + r": nothing says how much memory .*\"max_memory\" in \"offload\""
        ):
            way(spec(families, tiling="auto"))


def test_check_says_that_compile_decides(families):
    plan = diffkiln.check(spec(families, 10**9, tiling="auto"))
    assert any("no tiles if all calls fit so, else tiles of 2048 pixels" in each for each in plan.notices)


def test_a_tile_beside_it_is_refused(families):
    with pytest.raises(SpecError, match=WHERE + r"\.tile: the memory decides it"):
        diffkiln.check(spec(families, 10**9, tiling="auto", tile=32))
