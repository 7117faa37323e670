"""The server as operators meet it: start, keys, limits, the end."""

from __future__ import annotations

import base64
import http.client
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.serve.harness import ServerProcess, until

from headrace.errors import ConfigError
from headrace.serve.keys import Keys
from headrace.serve.options import ServeOptions

SHORT = {"prompt": "abc", "max_tokens": 2}
ALICE, BOB, ROOT = "key-of-alice", "key-of-bob-", "key-of-the-operator"


def serve(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "serve", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- the start ---------------------------------------------------------------------------------------------------------


def test_help_names_every_option() -> None:
    text = serve("--help", COLUMNS="160").stdout
    for flag in (
        "--port",
        "--api-key-file",
        "--max-queue",
        "--config",
        "--tls-cert",
        "--drain-timeout",
        "HEADRACE_SERVE_",
    ):
        assert flag in text, flag


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], "65535"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--write-timeout", "nan"], "--write-timeout"),
        (["--tls-cert", "x.pem"], "--tls-key"),
        (["--api-key-file", "/nonexistent"], "/nonexistent"),
        (["--log-level", "loud"], "loud"),
        (["--log-file", "/nonexistent/log"], "/nonexistent/log"),
        (["--host", "256.256.256.256"], "256.256.256.256"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["--threads", "0"], "threads"),
        (["no-such-model"], "no-such-model"),
        (["--port", "0", "a=no-such-model"], "no-such-model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_and_exit_1(flags: list[str], words: str) -> None:
    done = serve("--port", "0", *flags)
    problem = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 1 and len(problem) == 1 and words in problem[0], done.stderr


def test_a_port_in_use_is_told_before_anything_is_loaded(tiny_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve(tiny_model, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "in use" in done.stderr and "phase" not in done.stderr


def test_file_environment_and_flags(tiny_model: str, tmp_path: Path) -> None:
    """A flag comes before a variable, a variable before the file."""
    config = tmp_path / "serve.yaml"
    config.write_text(
        json.dumps(
            {"model": [f"a={tiny_model}"], "max-queue": 3, "max_context": 100, "threads": 1, "request-timeout": 5}
        )
    )
    with ServerProcess(
        "--config", str(config), "--max-context", "64", log=tmp_path / "log", HEADRACE_SERVE_MAX_SEQUENCES="2",
        HEADRACE_SERVE_MAX_CONTEXT="80", HEADRACE_SERVE_PREFIX_CACHE="false",
    ) as server:  # fmt: skip
        (card,) = server.call("GET", "/v1/models")[1]["data"]
        assert card["id"] == "a" and card["max_model_len"] == 64
        status, answer = server.post("/v1/completions", {**SHORT, "n": 6})
        assert status == 400 and "(5)" in answer["error"]["message"]
        assert server.post("/v1/completions", {**SHORT, "n": 5})[0] == 200
        for _ in range(2):
            usage = server.post("/v1/completions", {"prompt": [5] * 40, "max_tokens": 1})[1]["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    for text, words in (("port: [", "YAML"), ("- 1", "flags"), ("nonsense: 1", "nonsense"), ("config: x", "config")):
        config.write_text(text)
        done = serve("--config", str(config))
        assert done.returncode == 1 and words in done.stderr


def test_what_cannot_start_says_why_in_a_line(tiny_model: str) -> None:
    done = serve("-m", f"a={tiny_model}", "-m", f"a={tiny_model}", "--port", "0", "--threads", "1")
    assert done.returncode == 1 and "loaded already" in done.stderr and "Traceback" not in done.stderr


def test_an_engine_for_which_there_is_no_descriptor() -> None:
    code = """
import asyncio, resource
from headrace.errors import EngineDeadError
from headrace.workers.remote import RemoteEngine

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        await RemoteEngine(print, print).start()
    except EngineDeadError as error:
        print(error)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot be started: Too many open files" in done.stdout, done.stderr


def test_start_up_is_timed_in_the_log(server: ServerProcess) -> None:
    phases = {line["phase"]: line["seconds"] for line in server.logs() if line["event"] == "phase"}
    assert set(phases) >= {"listening", "open", "tokenizer", "engine", "model", "ready"}
    assert 0 < phases["engine"] <= phases["model"] <= phases["ready"]


def test_a_request_s_line_in_the_log(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", json.dumps(SHORT), {"x-request-id": "forged"})
    response = connection.getresponse()
    response.read()
    request_id = response.headers["x-request-id"]
    assert request_id != "forged" and len(request_id) == 24
    until(lambda: any(line.get("id") == request_id for line in server.logs()), 10)
    (line,) = [line for line in server.logs() if line.get("id") == request_id]
    assert (
        line["status"] == 200 and line["generated"] == 2 and line["total_ms"] > 0 and line["path"] == "/v1/completions"
    )
    assert "abc" not in json.dumps(line), "prompts are not logged"
    connection.close()


def test_health_and_ready_while_a_model_loads(tmp_path: Path, smollm2: Path) -> None:
    server = ServerProcess(str(smollm2), log=tmp_path / "log", wait=False)
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server.stop()
        server = ServerProcess(str(smollm2), "--port", str(port), log=tmp_path / "log", wait=False)
        server.port = port
        states = set()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                status, body = server.call("GET", "/health")
            except OSError:
                continue
            states.add((status, body["status"]))
            if status == 200:
                break
            status, body = server.post("/v1/completions", SHORT)
            assert status in (200, 503)
        assert (503, "loading") in states and (200, "ok") in states
    finally:
        server.stop()


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"# people\n{ALICE}\n\n")
    (folder / "admin").write_text(f"{ROOT}\n")
    flags = ["--api-key-file", str(folder / "keys"), "--admin-key-file", str(folder / "admin")]
    flags += ["--cors-origin", "https://app.example"]
    with ServerProcess(f"a={tiny_model}", "--threads", "1", *flags, log=folder / "log") as server:
        yield server, folder, tiny_model


def test_every_route_but_health_needs_a_key(locked: Any) -> None:
    server, _, _ = locked
    document = server.call("GET", "/openapi.json", headers=bearer(ALICE))[1]
    routes = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    assert len(routes) > 12
    for method, path in [*routes, ("GET", "/"), ("GET", "/nonsense"), ("OPTIONS", "/v1/models"), ("GET", "//health"),
                         ("GET", "/health/"), ("GET", "/healthx"), ("GET", "/v1/../health")]:  # fmt: skip
        status, body = server.call(method, path, b"{}" if method == "POST" else None)
        assert status == (200 if path == "/health" else 401), (method, path)
        if path != "/health":
            assert body["error"]["code"] == "invalid_api_key"
    for header in ("", "Bearer", "Bearer ", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", ALICE, f"Token {ALICE}",
                   f"Bearer {BOB}", "Bearer # people", "Basic !!", "Bearer " + "x" * 20_000):  # fmt: skip
        assert server.call("GET", "/v1/models", headers={"Authorization": header})[0] == 401, header
    assert server.call("GET", "/v1/models", headers=bearer(ALICE))[0] == 200
    basic = base64.b64encode(f"anyone:{ALICE}".encode()).decode()
    assert server.call("GET", "/v1/models", headers={"Authorization": f"Basic {basic}"})[0] == 200
    assert server.post("/admin/load", {"model": "x"}, headers=bearer(ALICE))[0] == 401


def test_keys_are_read_again(locked: Any) -> None:
    server, folder, _ = locked
    (folder / "keys").write_text(f"{ALICE}\n{BOB}\n")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.call("GET", "/v1/models", headers=bearer(BOB))[0] == 200, 5)
    (folder / "keys").write_text("")  # not usable: the keys of before stay
    time.sleep(1.3)
    assert server.call("GET", "/v1/models", headers=bearer(BOB))[0] == 200
    (folder / "keys").write_text(f"{ALICE}\n")  # without a signal
    until(lambda: server.call("GET", "/v1/models", headers=bearer(BOB))[0] == 401, 5)
    assert server.call("GET", "/v1/models", headers=bearer(ALICE))[0] == 200


def test_models_are_loaded_and_unloaded(locked: Any) -> None:
    server, _, model = locked
    root, alice = {"headers": bearer(ROOT)}, {"headers": bearer(ALICE)}
    assert server.post("/admin/load", {"model": model, "name": "b"}, **root)[0] == 200
    assert [card["id"] for card in server.call("GET", "/v1/models", **alice)[1]["data"]] == ["a", "b"]
    got = [server.post("/v1/completions", {**SHORT, "model": name, "seed": 1}, **alice)[1] for name in ("a", "b")]
    assert got[0]["model"] == "a" and got[1]["model"] == "b" and got[0]["choices"] == got[1]["choices"]
    assert server.post("/admin/load", {"model": model, "name": "b"}, **root)[0] == 409
    for name in ("line\nbreak", "x" * 300):
        assert server.post("/admin/load", {"model": model, "name": name}, **root)[0] == 400
    status, answer = server.post("/admin/load", {"model": "/etc/passwd"}, **root)
    assert status == 400 and "gguf" in answer["error"]["message"]
    assert server.post("/admin/load", {"model": "no-such-model", "name": "c"}, **root)[0] == 400
    assert server.call("GET", "/health")[0] == 200, "a model that was never there harms no other"
    engines = len(server.engine_pids())
    assert server.post("/admin/unload", {"model": "b"}, **root)[0] == 200
    assert len(server.engine_pids()) == engines - 1
    assert server.post("/v1/completions", {**SHORT, "model": "b"}, **alice)[0] == 404
    assert server.post("/admin/unload", {"model": "b"}, **root)[0] == 404


def test_pages_of_other_origins(locked: Any) -> None:
    server, _, _ = locked

    def preflight(origin: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
        return connection.getresponse()

    good = preflight("https://app.example")
    assert good.status == 204 and good.headers["access-control-allow-origin"] == "https://app.example"
    bad = preflight("https://evil.example")
    assert bad.status == 403 and "access-control-allow-origin" not in bad.headers
    own = {"Origin": f"http://127.0.0.1:{server.port}", **bearer(ALICE)}
    assert server.call("GET", "/v1/models", headers=own)[0] == 200


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    os.mkfifo(tmp_path / "pipe")  # reading which would wait for ever
    with pytest.raises(ConfigError, match="regular file"):
        Keys(str(tmp_path / "pipe"))
    for data in (b"", b"# nothing\n", b"short\n", b"x" * (2 << 20)):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=str(path)):
            Keys(str(path))
    path.write_bytes(b"a key with spaces\r\n")
    assert Keys(str(path)).admits(b"bearer a key with spaces") and not Keys(str(path)).admits(b"Bearer a key")


def test_options_are_checked() -> None:
    for field, value in (
        ("port", True),
        ("max_queue", 1.5),
        ("keep_alive", float("inf")),
        ("models", ()),
        ("engine", {"threads": -1}),
    ):
        with pytest.raises(ConfigError):
            ServeOptions(**{field: value})  # type: ignore[arg-type]


# -- TLS, logs, descriptors --------------------------------------------------------------------------------------------


def test_tls(tiny_model: str, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command, "-days", "2", "-subj", "/CN=localhost"], check=True, capture_output=True)
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--header-timeout", "1"]
    with ServerProcess(tiny_model, "--threads", "1", *flags, log=tmp_path / "log") as server:
        context = ssl.create_default_context(cafile=str(cert))
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=10)
        connection.request("POST", "/v1/completions", json.dumps({**SHORT, "stream": True}))
        assert b"[DONE]" in connection.getresponse().read()
        connection.close()
        assert server.raw(b"\x16\x03", timeout=5) == b"", "a handshake that stops is given up"
        began = time.monotonic()
        assert server.raw(b"", timeout=10) == b"" and time.monotonic() - began < 9
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, OSError)), socket.create_connection(("127.0.0.1", server.port)) as plain:
            old.wrap_socket(plain)
    done = serve(tiny_model, "--port", "0", "--tls-cert", str(key), "--tls-key", str(cert))
    assert done.returncode == 1 and "certificate" in done.stderr


def test_a_full_disk_for_logs_stops_nothing(tiny_model: str, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with ServerProcess(tiny_model, "--threads", "1", "--log-file", "/dev/full", log=tmp_path / "log") as server:
        for _ in range(3):
            assert server.post("/v1/completions", SHORT)[0] == 200
        assert server.metric("log_lines_dropped") > 0


def test_descriptors_run_out_and_come_back(tiny_model: str, tmp_path: Path) -> None:
    with ServerProcess(tiny_model, "--threads", "1", "--header-timeout", "2", log=tmp_path / "log") as server:
        limit = server.descriptors() + 20
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        sockets = []
        for _ in range(60):
            one = socket.socket()
            one.settimeout(1)
            one.connect(("127.0.0.1", server.port))
            sockets.append(one)
        time.sleep(0.3)
        for one in sockets:
            one.close()
        until(lambda: _status(server) == 200, 15)


def _status(server: ServerProcess) -> int:
    try:
        return server.post("/v1/completions", SHORT, timeout=3)[0]
    except OSError:
        return 0


def test_too_many_connections_are_told(tiny_model: str, tmp_path: Path) -> None:
    with ServerProcess(tiny_model, "--threads", "1", "--max-connections", "5", log=tmp_path / "log") as server:
        sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        assert server.raw(b"").startswith(b"HTTP/1.1 503")
        for one in sockets:
            one.close()
        until(lambda: _status(server) == 200, 10)


# -- the end -----------------------------------------------------------------------------------------------------------


class Long(threading.Thread):
    """A stream of many tokens, and how it ended."""

    def __init__(self, server: ServerProcess, tokens: int) -> None:
        super().__init__(daemon=True)
        self.server, self.tokens = server, tokens
        self.events: list[Any] = []
        self.error: Exception | None = None

    def run(self) -> None:
        body = {"prompt": "Once", "max_tokens": self.tokens, "ignore_eos": True, "return_token_ids": True}
        try:
            for event in self.server.stream("/v1/completions", body):
                self.events.append(event)
        except Exception as error:
            self.error = error


def test_sigterm_drains(smollm2: Path, tmp_path: Path) -> None:
    server = ServerProcess(str(smollm2), log=tmp_path / "log")
    engine = server.engine_pids()[0]
    streams = [Long(server, 80) for _ in range(3)]
    for stream in streams:
        stream.start()
    until(lambda: all(len(stream.events) > 2 for stream in streams), 10)
    idle = socket.create_connection(("127.0.0.1", server.port))
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.call("GET", "/ready")[1].get("status") == "draining", 10)
    status, answer = server.post("/v1/completions", SHORT)
    assert status == 503 and answer["error"]["code"] == "shutting_down"
    for stream in streams:
        stream.join(30)
        assert stream.error is None and stream.events[-1] == "[DONE]" and len(stream.events) >= 80
    idle.close()
    assert server.stop() == 0
    assert not os.path.exists(f"/proc/{engine}")


def test_a_second_sigterm_aborts(smollm2: Path, tmp_path: Path) -> None:
    server = ServerProcess(str(smollm2), log=tmp_path / "log")
    stream = Long(server, 5000)
    stream.start()
    until(lambda: len(stream.events) > 2, 10)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert server.process.poll() is None
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 4
    stream.join(5)
    assert stream.events[-1] == "[DONE]" and stream.events[-2]["error"]["code"] == "shutting_down"


def test_the_engine_does_not_outlive_a_killed_server(tiny_model: str, tmp_path: Path) -> None:
    server = ServerProcess(tiny_model, log=tmp_path / "log")
    engine = server.engine_pids()[0]
    server.stop(signal.SIGKILL)
    until(
        lambda: not os.path.exists(f"/proc/{engine}") or "Z" in Path(f"/proc/{engine}/stat").read_text().split()[2], 10
    )


def test_two_models_behind_one_server(tiny_model: str, tmp_path: Path) -> None:
    with ServerProcess(
        "--model", f"a={tiny_model}", "--model", f"b={tiny_model}", "--threads", "1", log=tmp_path / "log"
    ) as server:
        assert [card["id"] for card in server.call("GET", "/v1/models")[1]["data"]] == ["a", "b"]
        assert server.post("/v1/completions", {**SHORT, "model": "b"})[1]["model"] == "b"
        assert server.post("/v1/completions", SHORT)[1]["model"] == "a"
        assert server.post("/v1/completions", {**SHORT, "model": "c"})[0] == 404
