"""The page, what it is fed with, and the dashboard. In a browser where Chromium and playwright are installed."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.serve.harness import ServerProcess

import headrace
from headrace.serve.live import MAX_CELLS, Row, cells

WEB = Path(headrace.__file__).parent / "serve" / "web"
DASHBOARD = Path(headrace.__file__).parent / "serve" / "dashboard.json"
OF_STAGES = re.compile("headrace_(replica|stage|hop|reduce|kv_pages)")  # metrics that only split models have

# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/web/page.css", "css"), ("/web/page.js", "javascript")])
def test_files_come_with_a_strict_policy(tiny_server: ServerProcess, path: str, kind: str):
    connection = http.client.HTTPConnection("127.0.0.1", tiny_server.port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200 and response.headers.get_content_subtype() == kind and len(body) > 1000
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    connection.close()


def test_the_page_needs_nothing_from_elsewhere_and_makes_no_markup():
    html, script = (WEB / "index.html").read_text(), (WEB / "page.js").read_text()
    everything = html + script + (WEB / "page.css").read_text()
    assert set(re.findall(r"(?:https?:)?//[a-z][\w.]+", re.sub(r"(?m)^\s*//.*$", "", everything))) == {
        "http://www.w3.org"  # the icon's namespace, which nobody fetches
    }
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|localStorage", script)
    assert not re.search(r"<script(?! src=\"/web/page\.js\")|<style|\sstyle=|\son\w+=", html)
    named = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(named) > 20 and named <= set(re.findall(r'id="([\w-]+)"', html))


def test_other_files_are_not_served(tiny_server: ServerProcess):
    for path in ("/web/", "/web/../app.py", "/web/%2e%2e/app.py", "/web/index.html", "/dashboard.json"):
        assert tiny_server.call("GET", path)[0] == 404


# -- what the live view is fed with ------------------------------------------------------------------------------------


def test_cells():
    assert cells(bytes([3, 0, 1, 2, 3])) == {"pages": 4, "per_cell": 1, "states": [1, 1, 1, 1], "cells": "0123"}
    many = cells(bytes([0] + [0] * 5000 + [1] * 3 + [2] * 2))
    assert (many["pages"], many["per_cell"], many["states"]) == (5005, 3, [5000, 3, 2, 0])
    assert len(many["cells"]) == -(-5005 // 3) <= MAX_CELLS
    assert many["cells"][-3:] == "112" and not int(many["cells"][:-3])
    assert cells(bytes([0])) == {"pages": 0, "per_cell": 1, "states": [0, 0, 0, 0], "cells": ""}


def test_a_row_is_bounded():
    row = Row("id", "m", 5, 0.0)
    for at in range(1000):
        row.compute("p" if at % 2 else "d", at, at + 0.5, 2)
    assert len(row.spans) == 48 and sum(span[3] for span in row.spans) == 2000 and row.spans[-1][2] == 999.5
    close = Row("id", "m", 5, 0.0)
    for at in range(100):
        close.compute("d", at / 100, at / 100 + 0.005, 1)
    assert close.spans == [["d", 0.0, 0.995, 100]]


def look(server: ServerProcess, since: int = 0) -> dict[str, Any]:
    status, state = server.call("GET", f"/live?since={since}")
    assert status == 200
    return state


def ask(server: ServerProcess, **body: Any) -> None:
    status, answer = server.post("/v1/completions", {"ignore_eos": True, "temperature": 0, **body})
    assert status == 200, answer


def test_steps_and_requests(tiny_server: ServerProcess):
    before = look(tiny_server)
    prompt = [7] * 100 + list(range(60))
    ask(tiny_server, prompt=prompt, max_tokens=9)
    state = look(tiny_server, before["step"])
    assert {step[0] for step in state["steps"]} == set(range(before["step"] + 1, state["step"] + 1))
    assert sum(step[4] + step[5] for step in state["steps"]) >= 160 + 8
    row = state["requests"][-1]
    assert (row["model"], row["prompt"], row["generated"], row["reason"]) == ("tiny", 160, 9, "length")
    prefill = sum(span[3] for span in row["spans"] if span[0] == "p")
    decode = sum(span[3] for span in row["spans"] if span[0] == "d")
    assert (prefill + row["cached"], decode) == (160, 8)
    times = [row["began"], *row["opened"], row["first"], row["last"], row["ended"], state["now"]]
    assert times == sorted(times) and len(row["opened"]) == 1
    ask(tiny_server, prompt=prompt, max_tokens=1)
    assert look(tiny_server)["requests"][-1]["cached"] > 100
    assert look(tiny_server, 10**12)["steps"], "a page that was open before the server began anew gets all"
    assert tiny_server.call("GET", "/live?since=x")[0] == 400
    assert tiny_server.call("GET", "/live?model=none")[0] == 404


def test_pages_are_seen(tiny_server: ServerProcess):
    """Again and again four sequences, until a look at the map falls among them."""
    body = {"prompt": [[n + 1] * 200 for n in range(4)], "max_tokens": 300, "ignore_eos": True}
    pools = []
    for _ in range(100):
        thread = Thread(target=tiny_server.post, args=("/v1/completions", body))
        thread.start()
        while thread.is_alive():
            state = look(tiny_server)
            pools += state["pages"] or []
            time.sleep(0.02)
        if any(pool["states"][2] + pool["states"][3] > 20 for pool in pools):
            break
    else:
        raise AssertionError("no page was ever held")
    assert all(len(pool["cells"]) == pool["pages"] == sum(pool["states"]) for pool in pools)
    rows = [row for row in look(tiny_server)["requests"] if row["prompt"] == 200][-4:]
    assert all(row["ended"] and row["generated"] == 300 for row in rows)


def test_preemptions_are_seen(tiny_model: str, tmp_path: Path):
    """Of four sequences of 500 tokens, not all have room at once: some go and come back."""
    flags = ["--threads", "1", "--kv-memory", "400000", "--no-prefix-cache"]
    with ServerProcess(f"tiny={tiny_model}", *flags, log=tmp_path / "log") as server:
        body = {"prompt": [[n + 1] * 100 for n in range(4)], "max_tokens": 380}
        thread = Thread(target=ask, args=(server,), kwargs=body)
        thread.start()
        while thread.is_alive():  # what nobody looks at for 600 steps is forgotten
            look(server)
        rows = look(server)["requests"]
        assert len(rows) == 4 and server.metric("num_preemptions_total") > 0
        assert sum(len(row["opened"]) - 1 for row in rows) == server.metric("num_preemptions_total")
        for row in rows:
            again = [span for span in row["spans"] if span[0] == "p" and span[1] > row["opened"][-1] - 1e-6]
            assert row["opened"] == sorted(row["opened"]) and (again or len(row["opened"]) == 1)


def test_an_engine_that_dies(tiny_model: str, tmp_path: Path):
    """The view answers while there is no engine, and tells of the next one's steps."""
    with ServerProcess(f"tiny={tiny_model}", "--threads", "1", log=tmp_path / "log") as server:
        ask(server, prompt=[1, 2, 3], max_tokens=5)
        before = look(server)
        os.kill(server.engine_pids()[0], signal.SIGKILL)
        states = {look(server)["state"] for _ in range(20)}
        assert states <= {"ready", "restarting"}
        ask(server, prompt=[1, 2, 3, 4], max_tokens=6)
        state = look(server, before["step"])
        row = state["requests"][-1]
        assert (state["state"], row["prompt"], row["generated"]) == ("ready", 4, 6)
        assert sum(span[3] for span in row["spans"] if span[0] == "d") == 5 and state["steps"]


def test_rows_are_bounded(tiny_server: ServerProcess):
    for _ in range(30):
        ask(tiny_server, prompt=[[1], [2], [3], [4]], max_tokens=1)
    state = look(tiny_server)
    assert len(state["requests"]) == 96 and len(state["steps"]) <= 600


# -- the dashboard -----------------------------------------------------------------------------------------------------


def test_every_name_of_the_dashboard_is_a_metric(tiny_server: ServerProcess):
    ask(tiny_server, prompt=[1, 2, 3], max_tokens=3)
    _, text = tiny_server.call("GET", "/metrics")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    offered = {re.split(r"[{ ]", line)[0] for line in lines}
    typed = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries.append(dashboard["templating"]["list"][1]["query"]["query"])
    used = {name for query in queries for name in re.findall(r"\bheadrace_\w+", query)}
    used = {name for name in used if not OF_STAGES.match(name)}
    counters_without_series = {"headrace_engine_restarts_total", "headrace_requests_refused_total"} & typed
    assert used <= offered | counters_without_series
    assert len(used) > 20 and "headrace_kv_cache_usage" not in offered
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds",
                 "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                 "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total"):  # fmt: skip
        assert any(one.startswith(f"headrace_{name}") for one in used)
    for query in queries:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def faults() -> list[str]:
    return []


def opened(browser: Any, faults: list[str], url: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    return page


def until(page: Any, condition: str) -> None:
    """The page's policy forbids what playwright's own wait_for_function does."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def test_chat_by_keyboard(browser: Any, faults: list[str], server: ServerProcess):
    page = opened(browser, faults, server.url)
    page.wait_for_selector("#state:text-is('ready')")
    page.focus("summary")
    page.keyboard.press("Enter")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "12")
    page.focus("#prompt")
    page.keyboard.type("<img src=x onerror=alert(1)> What is red?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector(".facts")
    assert page.text_content(".message.user") == "<img src=x onerror=alert(1)> What is red?"
    assert page.locator("img").count() == 0
    _, answer = server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "<img src=x onerror=alert(1)> What is red?"}],
         "temperature": 0, "max_tokens": 12},
    )  # fmt: skip
    assert page.text_content(".message.assistant") == answer["choices"][0]["message"]["content"]
    assert "12 tokens" in page.text_content(".facts")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.fill("#max-tokens", "2000")
    page.fill("#prompt", "Count to a thousand.")
    page.click("#send")
    until(page, "document.querySelectorAll('.message.assistant')[1]?.textContent.length > 5")
    page.focus("#stop")  # a click would wait for it to stand still, which it does not while text comes
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.facts')[1]?.textContent.startsWith('stopped')")
    page.click("#clear")
    assert page.locator(".message").count() == 0
    assert not faults
    page.context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_live_view(browser: Any, faults: list[str], server: ServerProcess, scheme: str, width: int):
    page = opened(browser, faults, server.url, color_scheme=scheme, viewport={"width": width, "height": 844})
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#live") and not page.is_visible("#chat")
    body = {"prompt": [[n + 1] * 80 for n in range(8)], "max_tokens": 100, "ignore_eos": True}
    thread = Thread(target=server.post, args=("/v1/completions", body))
    thread.start()
    until(page, "Number(document.getElementById('t-gen').textContent) > 0")
    until(page, "document.querySelectorAll('#waterfall [role=row] .k-decode').length >= 8")
    thread.join()
    until(page, "document.getElementById('t-running').textContent === '0'")
    assert page.is_hidden("#stages"), "of a model that is not split"
    assert "prefill and" in page.text_content("#step-note") and "kept" in page.text_content("#page-note")
    for canvas in ("#c-rate", "#c-steps", "#c-pages"):
        colours = page.evaluate(
            "id => { const c = document.querySelector(id); const d = c.getContext('2d').getImageData(0, 0, c.width,"
            " c.height).data; const s = new Set(); for (let i = 0; i < d.length; i += 4) s.add(d[i] << 16 | d[i+1] << 8"
            " | d[i+2]); return s.size; }",
            canvas,
        )
        assert colours >= 2, canvas
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    assert not faults
    page.context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_stages(browser: Any, faults: list[str], tiny_model: str, tmp_path: Path, scheme: str, width: int):
    """A row a replica, with its state and what it does; lanes of steps; a trace to save."""
    keys = tmp_path / "keys"
    keys.write_text("admin-key\n")
    flags = ["--plan", "0-0 x2 | 1-2", "--admin-key-file", str(keys)]
    with ServerProcess(f"tiny={tiny_model}", *flags, log=tmp_path / "log") as server:
        options = {"color_scheme": scheme, "viewport": {"width": width, "height": 844}}
        page = opened(browser, faults, server.url + "/#live", **options)
        until(page, "document.querySelectorAll('#replicas tbody tr').length === 3")
        assert page.locator("#replicas tbody th").all_text_contents() == [
            "0.0layers 0–0",
            "0.1layers 0–0",
            "1.0layers 1–2",
        ]
        body = {"prompt": [[n + 1] * 60 for n in range(8)], "max_tokens": 400, "ignore_eos": True}
        Thread(target=server.post, args=("/v1/completions", body)).start()
        until(page, "/[1-9][0-9]* steps in 4 s/.test(document.getElementById('lane-note').textContent)")
        os.kill(look(server)["stages"][0]["replicas"][1]["pids"][0], signal.SIGKILL)
        until(page, "document.querySelector('#replicas .fate')?.textContent.includes('SIGKILL')")
        until(page, "document.getElementById('lane-note').textContent.includes('1 lost')")
        lost = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--lost')").strip()
        drawn = page.evaluate(
            "() => { const c = document.getElementById('c-lanes'); const d = c.getContext('2d').getImageData(0, 0,"
            " c.width, c.height).data; const s = new Set(); for (let i = 0; i < d.length; i += 4) s.add('#' +"
            " [d[i], d[i+1], d[i+2]].map((v) => v.toString(16).padStart(2, '0')).join('')); return [...s]; }"
        )
        assert lost in drawn and len(drawn) > 4
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
        until(
            page,
            "[...document.querySelectorAll('#replicas tbody td:nth-child(2)')].every((c) => c.textContent === 'ready')",
        )
        assert not faults
        page.fill("#admin-key", "wrong")
        page.press("#admin-key", "Enter")
        until(page, "document.getElementById('timeline-note').textContent.includes('a valid API key')")
        faults.clear()
        page.fill("#admin-key", "admin-key")
        with page.expect_download() as saved:
            page.click("#timeline button")
        assert len(json.loads(Path(saved.value.path()).read_text())["traceEvents"]) > 50
        assert not faults
        page.context.close()


def test_keys(browser: Any, faults: list[str], tiny_model: str, tmp_path: Path):
    """Without a key there is no page. A key that is no longer valid is asked for, and kept in the tab alone."""
    keys = tmp_path / "keys"
    keys.write_text("first-key\n")
    with ServerProcess(f"tiny={tiny_model}", "--api-key-file", str(keys), log=tmp_path / "log") as server:
        for path in ("/", "/web/page.js", "/live"):
            assert server.call("GET", path)[0] == 401
        basic = "Basic " + base64.b64encode(b"me:first-key").decode()
        assert server.call("GET", "/", headers={"Authorization": basic})[0] == 200
        page = opened(browser, faults, server.url, http_credentials={"username": "me", "password": "first-key"})
        page.wait_for_selector("#state:text-is('ready')")
        assert not page.is_visible("#key-form") and not faults
        keys.write_text("second-key\n")
        page.fill("#prompt", "x")
        page.wait_for_timeout(1500)
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-form:visible")
        page.fill("#key", "second-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#state:text-is('ready')")
        assert not page.is_visible("#key-form")
        assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        page.context.close()
