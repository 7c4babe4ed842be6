"""The live page in a real browser, before a stack whose worker dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.stack import Stack, eventually
from tests.pagewire.browser import Browser, browser, missing

ROW = "tr[data-name='worker-0']"
WATCH = """
window.shown = [];
const note = () => shown.push(document.querySelector(row)?.className);
const row = arguments[0];
new MutationObserver(note).observe(document.querySelector("#services"), { childList: true });
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("page"))
    try:
        stack.up("--runner", "simulated", "--step-time", "0.01", "--num-gpu-blocks", "300")
        yield stack
    finally:
        stack.close()


@pytest.fixture
def window(tmp_path: Path) -> Iterator[Browser]:
    if name := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI tests the page")
        pytest.skip(f"{name} is not installed")
    with browser(tmp_path) as window:
        yield window


@pytest.mark.slow
def test_a_person_sees_a_prompt_stream_and_a_worker_die_and_return(stack: Stack, window: Browser) -> None:
    window.open(stack.admin)
    eventually(lambda: window.run("return document.querySelectorAll('#services tr').length") >= 4)
    eventually(lambda: "ready" in window.text(f"{ROW} .state"))
    assert {window.text(f"#services tr:nth-child({i}) td") for i in (1, 2, 3, 4)} == {"frontend-0", "scheduler-0", "worker-0", "admin"}

    window.run("document.querySelector('#prompt').value = arguments[0]", "One upon another, " * 8)
    window.run("document.querySelector('#max-tokens').value = 320")  # three seconds: a stream that halts for a while gives fewer bars
    window.run("document.querySelector('#send').click()")
    eventually(lambda: "320 tokens" in window.text("#timing"))
    assert "first token" in window.text("#timing")
    assert len(window.text("#answer")) > 0
    assert window.run("return document.querySelectorAll('#latencies rect').length") > 10
    eventually(lambda: window.text("#finished") == "1")
    eventually(lambda: "cached" in window.text("#blocks figcaption") and " 0 cached" not in window.text("#blocks figcaption"))
    eventually(lambda: window.text("#ttft") != "–")

    window.run(WATCH, ROW)  # it is shown for three seconds, be somebody looking or not
    stack.kill("worker")
    eventually(lambda: "gone" in window.run("return shown"))
    eventually(
        lambda: window.run("return document.querySelector(arguments[0])?.className", ROW) == "" and window.text(f"{ROW} .state") == "ready"
    )
    eventually(lambda: "worker-0" in window.text("#events"))
    assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert window.errors() == []
    window.run("setTimeout(() => { throw new Error('on purpose') })")
    eventually(lambda: "on purpose" in str(window.errors()))


@pytest.mark.slow
def test_the_page_fits_a_phone_and_follows_dark_and_light(stack: Stack, window: Browser) -> None:
    window.media("dark", 390, 844)
    window.open(stack.admin)
    eventually(lambda: window.run("return document.querySelectorAll('#services tr').length") >= 4)
    assert window.run("return document.documentElement.scrollWidth") <= 390
    eventually(lambda: "MiB" in window.text(f"{ROW} td:last-child"))
    assert window.run("const table = document.querySelector('.wide'); return table.scrollWidth <= table.clientWidth"), "nothing is cut off"
    dark = window.run("return getComputedStyle(document.body).backgroundColor")
    window.media("light", 390, 844)
    eventually(lambda: window.run("return getComputedStyle(document.body).backgroundColor") != dark)
    assert window.errors() == []


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_script(stack: Stack) -> None:
    page = httpx.get(stack.admin, timeout=60)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("/", "/page.js", "/style.css"):
        text = httpx.get(stack.admin + name, timeout=60).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


@pytest.mark.slow
def test_a_prompt_that_another_site_could_send_is_refused_and_errors_come_through(stack: Stack) -> None:
    body = '{"prompt": "x", "max_tokens": 1}'
    assert httpx.post(f"{stack.admin}/prompt", timeout=60, content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.post(f"{stack.admin}/prompt", timeout=60, content="[", headers={"Content-Type": "application/json"}).status_code == 400
    wrong = httpx.post(f"{stack.admin}/prompt", timeout=60, json={"prompt": "x", "max_tokens": -1})
    assert wrong.status_code == 400
    assert "max_tokens" in wrong.json()["error"]["message"]


@pytest.mark.slow
def test_the_key_typed_in_the_page_reaches_the_api_and_no_other_is_taken(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("somebody a-key-that-is-long-enough-to-be-one\n")
    keys.chmod(0o600)
    stack = Stack(tmp_path)
    try:
        stack.up("--runner", "oracle", "--api-key-file", str(keys))
        body = {"prompt": "x", "max_tokens": 3, "stream": True, "ignore_eos": True}
        assert httpx.post(f"{stack.admin}/prompt", timeout=60, json=body).status_code == 401
        assert httpx.post(f"{stack.admin}/prompt", timeout=60, json=body, headers={"X-API-Key": "another"}).status_code == 401
        answer = httpx.post(f"{stack.admin}/prompt", timeout=60, json=body, headers={"X-API-Key": "a-key-that-is-long-enough-to-be-one"})
        assert answer.status_code == 200
        assert answer.text.rstrip().endswith("data: [DONE]")
    finally:
        stack.close()


@pytest.mark.slow
def test_a_prompt_whose_reader_leaves_is_stopped(stack: Stack) -> None:
    body = {"prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{stack.admin}/prompt", json=body, timeout=60) as answer:
        next(answer.iter_bytes())
    eventually(lambda: httpx.get(f"{stack.admin}/state", timeout=60).json()["totals"]["requests_running"] == 0)
    eventually(lambda: stack.metrics().get('pagewire_requests{name="frontend-0",status="aborted"}') == 1.0)


@pytest.mark.slow
def test_on_a_small_phone_the_services_fit_and_without_contact_what_is_old_is_pale(stack: Stack, window: Browser) -> None:
    window.media("light", 360, 740)
    window.open(stack.admin)
    eventually(lambda: window.run("return document.querySelectorAll('#services tr').length") >= 4)
    assert window.run("const box = document.querySelector('.wide'); return box.scrollWidth <= box.clientWidth")
    pale = "return getComputedStyle(document.querySelector('#services').closest('section')).opacity"
    assert window.run(pale) == "1"
    window.run("window.fetch = () => Promise.reject(new Error('cut off'))")
    eventually(lambda: "cut off" in window.text("#contact"))
    assert float(window.run(pale)) < 1
