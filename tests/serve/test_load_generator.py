"""The load generator: arrivals, traces, the client's clock, the formulas, and what it counts against a real server."""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.harness import ServerProcess

from headrace.errors import ConfigError, RequestError
from headrace.lab.load import Load, LoadOptions, Record, run_load
from headrace.lab.load_client import Answer, Client, Target
from headrace.lab.load_plan import BLOCK, Shot, arrivals, prompt_ids, read_trace
from headrace.lab.load_report import row_of, summary_of, write_load
from headrace.results import read_results
from headrace.serve.keys import read_key

# -- when --------------------------------------------------------------------------------------------------------------


def is_poisson(times: list[float], rate: float) -> bool:
    """Whether gaps have the mean and the spread of an exponential distribution, within 4 standard errors."""
    gaps = [b - a for a, b in pairwise(times)]
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps) / statistics.mean(gaps)
    error = 4 / math.sqrt(len(gaps))
    return abs(mean * rate - 1) < error and abs(spread - 1) < 1.5 * error


def test_arrivals_are_a_poisson_process():
    times = list(islice(arrivals(5.0, 1, seed=3), 4000))
    assert is_poisson(times, 5.0)
    assert times == list(islice(arrivals(5.0, 1, seed=3), 4000)) != list(islice(arrivals(5.0, 1, seed=4), 4000))
    assert not is_poisson([i / 5 for i in range(4000)], 5.0)
    assert not is_poisson(times, 5.5)


def test_bursts_keep_the_rate():
    times = list(islice(arrivals(10.0, 8, seed=1), 16_000))
    assert all(len(set(times[i : i + 8])) == 1 for i in range(0, 16_000, 8))
    assert is_poisson(times[::8], 10 / 8)


def test_traces_are_read(tmp_path: Path):
    csv = tmp_path / "a.csv"
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,0"]
    csv.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    first, second = read_trace(csv, 10, 2.0, 380, None)
    assert first == Shot(0.0, 374, 44) and (second.prompt, second.new) == (380, 1)
    assert second.at == pytest.approx((50.995169 - 46.68059) / 2)
    seconds = tmp_path / "b.csv"
    seconds.write_text("Timestamp,Model,Request tokens,Response tokens\n45,x,10,5\n5,x,7,6\n")
    assert read_trace(seconds, 10, 1.0, None, None) == [Shot(0.0, 7, 6), Shot(40.0, 10, 5)]
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [4, 5]}\n' * 3)
    assert read_trace(lines, 2, 1.0, None, None) == [Shot(0.0, 700, 9, (4, 5))] * 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no column timestamp"),
        ("a.csv", "time,x,y\n1,2,3\n", "no column timestamp"),
        ("a.csv", "timestamp,ContextTokens,GeneratedTokens\n1,2\n", "2 columns where the header has 3"),
        ("a.csv", "timestamp,ContextTokens,GeneratedTokens\n1,-2,3\n", "-2 prompt tokens"),
        ("a.csv", "timestamp,ContextTokens,GeneratedTokens\nnan,2,3\n", "its time is nan"),
        ("a.csv", "timestamp,ContextTokens,GeneratedTokens\nnever,2,3\n", "request 1 is not readable"),
        (
            "a.csv",
            "timestamp,ContextTokens,GeneratedTokens\n" + "1" * (1 << 20) + "1",
            "larger than field limit|longer than",
        ),
        ("a.jsonl", "{}\n", "request 1 is not readable"),
        ("a.jsonl", "[1]\n", "request 1 is not readable"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 1e99, "output_length": 1}\n', "prompt tokens"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str | None, message: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / name, 10, 1.0, None, None)


@pytest.mark.parametrize("name", ["azure_llm_2023_conv.csv", "mooncake_conversation.jsonl"])
def test_public_traces(name: str):
    """HEADRACE_TRACES names a folder that holds them."""
    path = Path(os.environ.get("HEADRACE_TRACES", "/nowhere")) / name
    if not path.exists():
        pytest.skip("HEADRACE_TRACES does not hold it")
    shots = read_trace(path, 2000, 1.0, None, None)
    assert len(shots) == 2000 and shots[0].at == 0 and shots[-1].at > 60


def test_equal_blocks_are_equal_tokens():
    one = prompt_ids(Shot(0, 700, 1, (4, 5)), 0, 9, 1000)
    other = prompt_ids(Shot(0, 1100, 1, (4, 6, 5)), 1, 9, 1000)
    assert len(one) == 700 and len(other) == 1100
    assert one[:BLOCK] == other[:BLOCK] and one[BLOCK:][:76] == other[2 * BLOCK :] != other[BLOCK:][:76]
    assert prompt_ids(Shot(0, 64, 1), 0, 9, 1000) != prompt_ids(Shot(0, 64, 1), 1, 9, 1000)
    assert prompt_ids(Shot(0, 64, 1), 0, 9, 1000) == prompt_ids(Shot(0, 64, 1), 0, 9, 1000)


# -- the client --------------------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


ANSWER = [
    event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
    b": keep-alive\n\n",
    event(choices=[{"index": 0, "delta": {"content": "a"}}]),
    event(choices=[{"index": 0, "text": "é\n"}]),
    event(choices=[{"index": 0, "text": "", "token_ids": [7]}]),
    event(choices=[{"index": 0, "text": "", "finish_reason": "length"}]),
    event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3}),
    b"data: [DONE]\n\n",
]
WHOLE = HEAD + b"".join(map(chunked, ANSWER)) + b"0\r\n\r\n"

Script = list[tuple[float, bytes]]  # (seconds to wait, bytes to send), then hang up


async def ask_scripted(script: Script, timeout: float = 5.0) -> Answer:
    """What the client makes of a server that does as the script says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for pause, data in script:
            await asyncio.sleep(pause)
            writer.write(data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    client = Client(target, timeout)
    try:
        return await client.ask(target.request("GET", "/"))
    finally:
        client.close()
        server.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12))
def test_an_answer_is_the_same_however_it_is_cut(cuts: list[int]):
    edges = [0, *sorted(set(cuts)), len(WHOLE)]
    answer = asyncio.run(ask_scripted([(0.0, WHOLE[a:b]) for a, b in pairwise(edges)]))
    assert (answer.outcome, answer.tokens, answer.prompt_tokens, len(answer.arrivals)) == ("ok", 3, 5, 3)


async def test_times_are_those_of_the_wire():
    pauses = [0.0, 0.15, 0.05, 0.10]  # head and role, then three tokens
    pieces = [HEAD + chunked(ANSWER[0]), *map(chunked, ANSWER[2:5])]
    rest = b"".join(map(chunked, ANSWER[5:])) + b"0\r\n\r\n"
    answer = await ask_scripted([*zip(pauses, pieces), (0.08, rest)])
    seen = [b - a for a, b in pairwise([answer.sent, *answer.arrivals, answer.ended])]
    assert seen == pytest.approx([0.15, 0.05, 0.10, 0.08], abs=0.04)


@pytest.mark.parametrize(
    ("script", "outcome", "status", "error"),
    [
        ([(0, HEAD + chunked(ANSWER[2]))], "failed", 200, "ended before"),
        ([(0, HEAD + chunked(ANSWER[2]) + chunked(event(error={"message": "no"})) + b"0\r\n\r\n")],
         "failed", 200, "'no'"),
        ([(0, HEAD + chunked(b"data: {broken\n\n"))], "failed", 200, "not readable"),
        ([(0, HEAD + b"0\r\n\r\n")], "failed", 200, None),
        ([(0, b"HTTP/1.1 429 X\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}")], "rejected", 429, "{}"),
        ([(0, b"HTTP/1.1 500 X\r\nContent-Length: 4\r\n\r\noops")], "failed", 500, "oops"),
        ([(0, b"gibberish\r\n\r\n")], "failed", 0, "not readable"),
        ([(0, b"")], "failed", 0, "ended before"),
        ([(3, b"")], "failed", 0, "within 0.3 s"),
    ],
)  # fmt: skip
async def test_faults_are_counted_and_not_raised(script: Script, outcome: str, status: int, error: str | None):
    answer = await ask_scripted(script, timeout=0.3)
    assert (answer.outcome, answer.status) == (outcome, status)
    assert error is None if answer.error is None else error is not None and error in answer.error
    assert answer.retry_after == (7 if status == 429 else None)
    assert answer.ended >= answer.sent > 0


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:99999", "http://x/?a=1", "http://x:y"])
def test_bad_addresses(url: str):
    with pytest.raises(ConfigError, match="is no server's address"):
        Target(url)


def test_what_is_sent():
    target = Target("https://host.example/base/v1/", "secret-key")
    assert (target.host, target.port, target.prefix) == ("host.example", 443, "/base") and target.tls is not None
    head = target.request("POST", "/v1/x", b"{}").decode()
    assert head.startswith("POST /base/v1/x HTTP/1.1\r\nHost: host.example\r\nAuthorization: Bearer secret-key\r\n")
    assert head.endswith("Content-Length: 2\r\n\r\n{}")
    with pytest.raises(ConfigError, match="printable"):
        Target("http://x", "a\r\nX-Evil: 1")


def test_keys_from_a_file(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# mine\n\n  one-key  \nother\n")
    assert read_key(file) == "one-key" and read_key(None) is None
    file.write_text("#\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_key(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "none")


# -- the formulas ------------------------------------------------------------------------------------------------------


def loaded(*records: Record, **options: object) -> Load:
    return Load(
        LoadOptions(url="x", rate=1.0, **options),  # type: ignore[arg-type]
        began=100.0, records=list(records), cpu_seconds=0.5, seconds=10.0, prompts="ids", model="m",
    )  # fmt: skip


def record(scheduled: float, sent: float, *arrivals: float, status: int = 200, error: str | None = None) -> Record:
    answer = Answer(100 + sent, 0.0, status, [100 + at for at in arrivals], 5, len(arrivals), None, error)
    answer.ended = 100 + max(arrivals, default=sent) + 0.5
    return Record(scheduled, Shot(scheduled, 5, len(arrivals)), answer)


def test_the_formulas():
    load = loaded(record(1, 2, 4, 5, 9), slo_ttft=3.0, slo_itl=4.0)
    row = row_of(load, load.records[0])
    times = {name: row[name] for name in row if name.endswith("_s") or name == "tokens_per_second"}
    assert times == {
        "scheduled_s": 1, "sent_s": 2, "ttft_s": 2, "ttft_scheduled_s": 3, "tpot_s": 2.5, "longest_itl_s": 4,
        "latency_s": 7.5, "latency_scheduled_s": 8.5, "tokens_per_second": 3 / 7.5,
    }  # fmt: skip
    assert row["slo_met"] is True
    for slo in ({"slo_ttft": 2.9}, {"slo_itl": 3.9}):
        assert (
            row_of(loaded(slo_ttft=slo.get("slo_ttft"), slo_itl=slo.get("slo_itl")), load.records[0])["slo_met"]
            is False
        )


def test_the_summary():
    load = loaded(
        record(0, 0, 1, 2, 3),
        record(0, 1, 4),
        record(1, 1, status=429, error="{}"),
        record(2, 2, 3, status=200, error="broke"),
        slo_ttft=2.0,
    )
    summary = summary_of(load)
    counts = [summary[name] for name in ("requests", "completed", "rejected", "failed")]
    assert counts == [4, 2, 1, 1]
    assert (summary["mean_ttft_s"], summary["mean_ttft_scheduled_s"]) == (2, 2.5)
    assert (summary["mean_itl_s"], summary["max_itl_s"], summary["mean_tpot_s"]) == (1, 1, 1)
    assert summary["p99_ttft_s"] == pytest.approx(1 + 2 * 0.99)
    assert (summary["tokens_per_sec"], summary["requests_per_sec"]) == (0.4, 0.2)
    assert (summary["goodput_requests_per_sec"], summary["slo_met_share"]) == (0.1, 0.25)
    assert summary["client_cpu_cores"] == 0.05 and summary["client_cpu_us_per_token"] == 125_000
    assert summary["p99_send_lag_s"] == pytest.approx(0.97)
    assert "goodput_requests_per_sec" not in summary_of(loaded(record(0, 0, 1)))
    assert summary_of(loaded(record(0, 0, status=429)))["completed"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say how requests come"),
        ({"rate": 1.0, "trace": "x"}, "exclude each other"),
        ({"concurrency": 1, "burst": 2}, "--burst goes with"),
        ({"rate": 1.0, "speed": 2.0}, "--speed goes with"),
        ({"rate": 0.0}, "--rate must be from"),
        ({"rate": math.nan}, "--rate must be from"),
        ({"rate": 1.0, "slo_ttft": math.inf}, "--slo-ttft must be from"),
        ({"concurrency": 100_000}, "--concurrency must be from 1 to 10000"),
        ({"rate": 1.0, "requests": 0}, "--requests must be from 1 to 1e\\+06"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LoadOptions(url="x", **options)


# -- against a server --------------------------------------------------------------------------------------------------


def go(server: ServerProcess, **options: object) -> Load:
    looks: list[int] = []
    load = run_load(
        LoadOptions(url=server.url, **options),  # type: ignore[arg-type]
        None,
        lambda progress: looks.append(progress.tokens),
    )
    assert looks == sorted(looks) and looks
    return load


def test_an_open_loop(tiny_server: ServerProcess, tmp_path: Path):
    load = go(tiny_server, rate=40.0, requests=40, prompt_tokens=9, max_tokens=7, slo_ttft=5.0)
    summary = summary_of(load)
    assert (summary["completed"], summary["slo_met_share"]) == (40, 1.0)
    for one in load.records:
        assert (one.answer.prompt_tokens, one.answer.tokens, len(one.answer.arrivals)) == (9, 7, 7)
        assert 0 < one.answer.sent - load.began - one.scheduled < 1
    expected = list(islice(arrivals(40.0, 1, 0), 40))
    assert [one.scheduled for one in load.records] == expected
    assert load.seconds > expected[-1]
    assert 0 < load.cpu_seconds < load.seconds
    write_load(load, tmp_path / "out.json")
    results = read_results(tmp_path / "out.json")
    assert len(results["runs"]) == 40 and results["summary"]["p99_itl_s"] == summary["p99_itl_s"]
    assert results["config"]["rate"] == 40.0 and results["config"]["model"] == "tiny"


def test_a_closed_loop_keeps_its_number_open(tiny_server: ServerProcess):
    load = go(tiny_server, concurrency=3, requests=30, prompt_tokens=4, max_tokens=20)
    spans = [(r.answer.sent, 1) for r in load.records] + [(r.answer.ended, -1) for r in load.records]
    most = now = 0
    for _, change in sorted(spans):
        now += change
        most = max(most, now)
    assert most == 3 and summary_of(load)["completed"] == 30


def test_places_hold_back_what_is_scheduled(tiny_server: ServerProcess):
    summary = summary_of(go(tiny_server, rate=1000.0, burst=20, concurrency=1, requests=20, max_tokens=20))
    assert summary["completed"] == 20
    assert summary["max_ttft_scheduled_s"] > 5 * summary["max_ttft_s"]


def test_rejections_are_counted(tiny_server: ServerProcess):
    """4 sequences run and 8 wait: of 60 at once some are refused, and all are accounted for."""
    summary = summary_of(go(tiny_server, rate=10_000.0, burst=60, requests=60, prompt_tokens=200, max_tokens=200))
    assert summary["rejected"] > 0 and summary["completed"] >= 12 and summary["failed"] == 0
    assert summary["completed"] + summary["rejected"] == summary["requests"] == 60


def test_what_does_not_fit_has_failed(tiny_server: ServerProcess, tmp_path: Path):
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,ContextTokens,GeneratedTokens\n0,5,3\n0.1,5000,3\n0.2,6,3\n")
    load = go(tiny_server, trace=str(trace), speed=2.0)
    assert [one.answer.outcome for one in load.records] == ["ok", "failed", "ok"]
    assert "5000" in row_of(load, load.records[1])["error"]
    assert [one.answer.prompt_tokens for one in load.records] == [5, 0, 6]


def test_a_server_that_says_no(tiny_server: ServerProcess):
    with pytest.raises(RequestError, match=r"404.*no model 'other'"):
        go(tiny_server, concurrency=1, model="other")
    with pytest.raises(RequestError, match="does not answer"):
        run_load(LoadOptions(url="http://127.0.0.1:9", concurrency=1), None, lambda _: None)


@contextmanager
def plain_server() -> Iterator[int]:
    """A server of the same API that knows no token ids."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(b"GET /v1/models"):
                body = b'{"data": [{"id": "their-model"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            elif head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n")
            else:
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                assert isinstance(json.loads(await reader.readexactly(size))["prompt"], str)
                events = [event(choices=[{"text": "a"}]), event(choices=[{"text": "b"}]), b"data: [DONE]\n\n"]
                writer.write(HEAD + b"".join(map(chunked, events)) + b"0\r\n\r\n")

    ports: list[int] = []

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        try:
            await server.serve_forever()
        except asyncio.CancelledError:
            pass

    loop, ready = asyncio.new_event_loop(), Event()
    task = loop.create_task(main())
    thread = Thread(target=loop.run_until_complete, args=(task,))
    thread.start()
    try:
        assert ready.wait(10)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        for left in asyncio.all_tasks(loop):
            left.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()


def test_a_server_without_token_ids():
    with plain_server() as port:
        load = run_load(LoadOptions(url=f"http://127.0.0.1:{port}", concurrency=2, requests=6), None, lambda _: None)
    assert [one.answer.tokens for one in load.records] == [2] * 6
    assert load.model == "their-model" and load.prompts == "random words"


def test_the_command(tiny_server: ServerProcess, tmp_path: Path):
    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "headrace", "load", tiny_server.url, *flags]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    file = tmp_path / "out.json"
    done = command("--concurrency", "2", "--requests", "5", "--max-tokens", "4", "--slo-ttft", "9", "--json", str(file))
    assert done.returncode == 0, done.stderr
    for part in (
        "TTFT, scheduled",
        "p99",
        "5 of 5 requests completed, 0 rejected (429), 0 failed",
        "goodput",
        "of CPU",
    ):
        assert part in done.stdout
    assert read_results(file)["summary"]["completed"] == 5
    refused = command(
        "--rate", "1", "--json", str(tmp_path / "no" / "out.json"), "--requests", "1", "--max-tokens", "1"
    )
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "cannot write" in refused.stderr
    assert command().stderr == "headrace: say how requests come: --rate, --concurrency or --trace\n"
