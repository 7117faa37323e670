"""A real server in a process of its own, and a plain client for it."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 60


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What the condition gives, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.005)
    return found


class ServerProcess:
    """`headrace serve` on a free port of the loopback. `flags` as on the command line."""

    def __init__(self, *flags: str, log: Path, wait: bool = True, **environment: str) -> None:
        self.log_path = log
        self._log = open(log, "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headrace", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | environment,
        )
        self.port = 0
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], START_SECONDS)[0]:
            raise AssertionError(f"the server did not start: {self.log_path.read_text()[-3000:]}")
        line = self.process.stdout.readline().decode()
        found = re.search(r"https?://\S+:(\d+)", line)
        assert found, f"{line!r} {self.log_path.read_text()[-3000:]}"
        self.port = int(found[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def logs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]

    def engine_pids(self) -> list[int]:
        """Processes that the server has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, Any]:
        """(status, decoded body) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            text = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json else text.decode()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        return self.call("POST", path, body, **options)

    def stream(self, path: str, body: dict[str, Any], timeout: float = 60) -> Iterator[Any]:
        """The events of a streamed answer, decoded; the last is "[DONE]". Leaving the iterator hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = json.dumps({**body, "stream": True}).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise AssertionError(f"{response.status}: {response.read().decode()}")
            assert response.headers.get_content_type() == "text/event-stream"
            for line in response:
                if line.startswith(b"data: "):
                    text = line[6:].strip().decode()
                    yield text if text == "[DONE]" else json.loads(text)
        finally:
            connection.close()

    def raw(self, data: bytes, timeout: float = 10, half_close: bool = False) -> bytes:
        """What comes back for these bytes, until the server hangs up or `timeout` seconds pass in silence."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            received = b""
            try:
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(65536):
                    received += piece
            except (TimeoutError, ConnectionError):
                pass
            return received

    def metric(self, name: str) -> float:
        """The sum of a metric's series; `name` may go on to its first labels."""
        _, text = self.call("GET", "/metrics")
        lines = [line for line in text.splitlines() if re.match(rf"headrace_{re.escape(name)}(\{{|\s|\w+=)", line)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_idle(self, seconds: float = 20) -> None:
        """Until nothing runs, nothing waits, and no page is held."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # Gauges tell of the last step, so one more is made.
            status, _ = self.post("/v1/completions", {"prompt": [5], "max_tokens": 1})
            if status == 200 and not self.metric("num_requests_running") and not self.metric("num_requests_waiting"):
                assert self.metric("kv_cache_usage_perc") == 0
                return
            time.sleep(0.05)
        raise AssertionError("requests are still there")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        """Exit code, after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the server did not stop") from None
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._log.close()
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
