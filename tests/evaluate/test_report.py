"""The report: what it says, and that it asks nobody for anything, in a browser too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffkiln.evaluate.charts import bars, lines, waterfall
from diffkiln.evaluate.report import report
from diffkiln.program.schedule import Step
from tests.evaluate.making import STRANGE, bench, evaluation

SCHEDULES = {"main": {"transformer": [Step(number, 1.0, 1, blocks) for number, blocks in enumerate((4, 0, 2, 4))]}}
ROWS = [{"pass": "fuse_qkv", "value": 60.0}, {"pass": "quantize", "value": 35.0}, {"pass": "bundle", "value": None}]
BUILD = {
    "ledger": {"tables": [{"metric": "psnr", "at_least": 20, "cumulative": ROWS}]},
    "weights": {"transformer": 4_000_000},
    "passes": [{"name": "quantize", "component": "transformer", "bytes": 2_000_000}],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return report(evaluation(tmp_path_factory.mktemp("album")), bench(), SCHEDULES, BUILD)


def test_everything_is_in_one_file_and_nothing_is_asked_for(page):
    assert not re.findall(r"@import|<link[^>]+http|<script src|url\((?!#)", page)
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]*)""", page)
    assert all(address.startswith("data:") for address in addresses if address)
    assert "default-src 'none'" in page


def test_what_others_wrote_is_text(page):
    assert STRANGE not in page
    assert page.count("&lt;/script&gt;") >= 3
    assert page.count("</script>") == 1


def test_numbers_schedules_gates_and_what_was_not_measured_are_there(page):
    for words in ("psnr", "ssim", "quantize", "psnr at least 20", "bundle against eager diffusers"):
        assert words in page, words
    assert "clip_score: needs a backbone: --backbone clip=FOLDER" in page
    assert "Weights by component, after each pass that changed them." in page
    assert 'class="some" title="step 3: some blocks"' in page
    assert "A processor, 2 cores" in page


def test_without_bench_and_ledger_it_says_so(tmp_path):
    page = report(evaluation(tmp_path))
    assert "<li>speed and memory</li>" in page
    assert "the spec has no quality gates" in page


def test_of_many_pictures_the_worst_are_shown(tmp_path):
    page = report(evaluation(tmp_path, count=26))
    assert "The 24 worst are shown." in page
    assert page.count('class="pair small"') == 24


def test_a_ledger_of_a_stranger_does_no_harm(tmp_path):
    made = evaluation(tmp_path, count=1)
    for ledger in ({"tables": 3}, {"tables": [1, {"cumulative": 2}]}, {"tables": [{"cumulative": []}]}):
        assert "Pictures" in report(made, build={"ledger": ledger})


@pytest.mark.parametrize("name", ["$\\nothing{$", "</text><script>", "\x07", "_hidden", "\ud800"])
def test_names_of_a_stranger_are_text_in_charts(tmp_path, name):
    made = evaluation(tmp_path, count=1)
    ledger = {"tables": [{"metric": name, "at_least": 20, "cumulative": [{"pass": name, "value": 60.0}] * 2}]}
    passes = [{"name": name, "component": name, "bytes": 1}]
    page = report(made, build={"ledger": ledger, "weights": {name: 2}, "passes": passes})
    assert page.count("</script>") == 1
    assert "Pictures" in page


def test_charts_take_the_page_s_colour_and_no_address():
    made = (
        bars({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, "ms"),
        lines({"one": [1.0, 0.1]}, "step", "distance"),
        waterfall([("a", 3.0), ("b", 1.0)], "dB", 2.0),
    )
    for svg in made:
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert "<metadata" not in svg
        assert "#000000" not in svg


def test_charts_repeat_bit_for_bit():
    assert bars({"a": {"x": 1.0}}, "ms") == bars({"a": {"x": 1.0}}, "ms")


# -- in chromium --


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_chromium_it_fits_slides_and_asks_nobody(browser, page, tmp_path: Path, width, scheme):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    opened, wrong = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda line: wrong.append(line.text) if line.type in ("error", "warning") else None)
    allowed = (address, "data:")
    opened.on("request", lambda asked: None if asked.url.startswith(allowed) else wrong.append(asked.url))
    opened.goto(address)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("[...document.images].every(image => image.complete && image.naturalWidth === 32)")
    opened.locator(".pair input").first.fill("25")
    assert opened.locator(".pair").first.evaluate("pair => pair.style.getPropertyValue('--at')") == "25%"
    box = opened.locator(".pair").first.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20)
    opened.mouse.up()
    at = opened.locator(".pair").first.evaluate("pair => parseFloat(pair.style.getPropertyValue('--at'))")
    assert 70 <= at <= 90
    plain = opened.locator(".pairs").screenshot()
    opened.click("#toggle")
    assert opened.locator(".difference").first.is_visible()
    assert opened.locator(".pairs").screenshot() != plain
    colour = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 22, 21)")
    opened.screenshot(path=str(tmp_path / f"report-{width}-{scheme}.png"), full_page=True)
    opened.emulate_media(media="print")
    assert not opened.locator("#toggle").is_visible()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.pdf()[:5] == b"%PDF-"
    opened.close()
    assert wrong == []
