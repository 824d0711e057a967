"""The page at `/`, without and within a browser."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator

import httpx2
import pytest

import diffkiln
from diffkiln.serving import worker
from tests.serving.conftest import GENERATIONS, running


def test_the_page_brings_everything_itself(served):
    answer = served.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?:", answer.text.replace("made.src =", ""))
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy


def test_a_name_cannot_break_out_of_the_page(drawing, tmp_path):
    from dataclasses import replace

    from diffkiln.serving.offer import read_offer
    from diffkiln.serving.page import page

    offer = replace(read_offer(drawing, "x"), name="</script><img src=x onerror=alert(1)>")
    html, _ = page({GENERATIONS: {offer.name: offer}}, False)
    assert "<img" not in html


# -- in chromium --


class Slow:
    """A pipeline whose steps take half a second more."""

    def __init__(self, pipe) -> None:
        self.pipe, self.bundle, self.executor = pipe, pipe.bundle, pipe.executor

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()

    def __call__(self, callback_on_step_end, **keywords):
        def end(*given):
            time.sleep(0.5)
            return callback_on_step_end(*given)

        return self.pipe(callback_on_step_end=end, **keywords)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, served) -> Iterator:
    """The page; what it asks of others, and what goes wrong in it, fails the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda line: wrong.append(line.text) if line.type == "error" and "400" not in line.text else None
    )
    page.on("request", lambda asked: None if asked.url.startswith((served.url, "data:")) else wrong.append(asked.url))
    page.goto(served.url)
    yield page
    context.close()
    assert wrong == []


@pytest.mark.more
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
class TestInChromium:
    def test_it_draws_and_shows_steps_seed_and_the_same_command(self, opened, served, tmp_path, monkeypatch):
        step = worker._Watch.__call__
        monkeypatch.setattr(worker._Watch, "__call__", lambda *told: time.sleep(0.1) or step(*told))
        opened.fill("#prompt", 'it\'s a "seven"')
        opened.fill("#seed", "7")
        opened.select_option("#size", "32x32")
        opened.evaluate(
            "window.states = []; new MutationObserver(() => states.push(document.getElementById('state').textContent))"
            ".observe(document.getElementById('state'), {childList: true})"
        )
        opened.click("#go")
        picture = opened.wait_for_selector("#made img")
        assert opened.evaluate("image => image.naturalWidth", picture) == 32
        assert opened.text_content("#state") == "Seed 7"
        # What comes at once is shown at once, so that a step may be passed over, or all of them if they are short.
        states = opened.evaluate("states")
        shown = [state for state in states if state.startswith("Step")]
        assert shown, states
        assert shown == sorted(set(shown)), states
        assert all(state.endswith(" of 4") for state in shown), states
        opened.click("#copy")
        command = opened.evaluate("navigator.clipboard.readText()")
        assert command == opened.text_content("#curl")
        shown = opened.get_attribute("#made img", "src").partition(",")[2]
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert shown in done.stdout
        opened.screenshot(path=str(tmp_path / "page.png"), full_page=True)

    def test_previews_are_shown_where_they_are_asked_for(self, opened):
        opened.evaluate(
            "window.shown = []; new MutationObserver((changes) => changes.forEach((change) => "
            "change.addedNodes.forEach((node) => shown.push(node.className))))"
            ".observe(document.getElementById('made'), {childList: true})"
        )
        opened.fill("#prompt", "a seven")
        opened.select_option("#previews", "2")
        opened.click("#go")
        opened.locator("#state", has_text="Seed").wait_for()
        assert opened.evaluate("shown") == ["small preview", "small preview", "small"]

    def test_an_error_is_shown_and_gone_with_the_next_drawing(self, opened):
        opened.fill("#prompt", "x" * 4_001)
        opened.click("#go")
        opened.wait_for_selector("#error:not([hidden])")
        assert "at most 4000 characters" in opened.text_content("#error")
        opened.fill("#prompt", "a seven")
        opened.click("#go")
        opened.wait_for_selector("#made img")
        assert opened.is_hidden("#error")

    def test_stopping_ends_the_call_at_its_next_step(self, browser, drawing):
        with running(drawing, lambda: Slow(diffkiln.load(drawing))) as slow:
            page = browser.new_page()
            page.goto(slow.url)
            page.fill("#prompt", "a seven")
            page.click("#go")
            page.locator("#state", has_text="Step 1").wait_for()
            page.click("#stop")
            page.wait_for_selector("#go:not([disabled])")
            assert page.is_hidden("#error")
            ends = time.monotonic() + 10
            while not slow.numbers()["diffkiln_calls_abandoned_total"]:
                assert time.monotonic() < ends
            page.close()

    def test_a_page_for_edits_sends_a_file(self, browser, editing):
        from tests.serving.test_hostile import saved

        with running(editing) as edits:
            page = browser.new_page()
            page.goto(edits.url)
            page.fill("#prompt", "a nine")
            page.set_input_files("#files input", {"name": "a.png", "mimeType": "image/png", "buffer": saved("PNG")})
            page.click("#go")
            page.wait_for_selector("#made img")
            page.close()

    def test_a_token_is_asked_for(self, browser, drawing):
        from diffkiln.serving.settings import digests

        with running(drawing, tokens=digests(["x" * 20], "here"), wait=True) as guarded:
            page = browser.new_page()
            page.goto(guarded.url)
            page.fill("#prompt", "a nine")
            page.click("#go")
            page.wait_for_selector("#error:not([hidden])")
            page.fill("#token", "x" * 20)
            page.click("#go")
            page.wait_for_selector("#made img")
            assert "x" * 20 not in page.text_content("#curl")
            page.close()
            assert httpx2.get(f"{guarded.url}/metrics", trust_env=False).status_code == 401
