"""The server's process: from options to a listening socket, and to a quiet end.

bind ─▶ listen (health: loading) ─▶ load models ─▶ ready ─▶ SIGTERM ─▶ drain ─▶ closed
                                                             SIGTERM again ─▶ abort ─┘
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import partial
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from ..errors import ConfigError
from ..processes import settle
from .app import Server
from .faults import Fault
from .logs import JsonHandler, set_up
from .options import ServeOptions
from .protocol import LimitedProtocol, look_at_all
from .spans import spans_for

log = logging.getLogger("headrace.serve")

SWITCH_SECONDS = 0.0005  # for which a thread (a long text being encoded) may keep the event loop waiting
ENCODERS = 2  # threads that encode long texts
ABORT_SECONDS = 2.0  # for which aborted requests may say so
BACKLOG = 1024


def run(options: ServeOptions) -> None:
    """Serve until told to stop. Raises ConfigError where the port, the keys, the log or the certificate are not
    usable, and what loading a model raises."""
    sys.setswitchinterval(SWITCH_SECONDS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a long text is one anyway, and it warns at every fork
    handler = set_up(options.log_file, options.log_level)
    try:
        uvloop.run(Process(options, handler).main())
    finally:
        handler.close()


class Process:
    """The running server."""

    def __init__(self, options: ServeOptions, handler: JsonHandler) -> None:
        self._options, self._began = options, time.monotonic()
        self._server = Server(options)
        self._server.spans = spans_for(options.otel_endpoint)
        self._server.metrics.watch_log(handler)
        self._state = ServerState()
        self._stop = asyncio.Event()
        self._abort = asyncio.Event()

    async def main(self) -> None:
        _raise_file_limit()
        tls = _tls(self._options)
        sock = _bind(self._options)
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(ENCODERS, "headrace-text"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._server.reload_keys)
        patience = self._options.header_timeout if tls else None
        listener = await loop.create_server(
            self._protocol(), sock=sock, ssl=tls, ssl_handshake_timeout=patience, backlog=BACKLOG
        )
        self._phase("listening", self._began)
        ticker = asyncio.create_task(self._tick())
        loading = asyncio.create_task(self._load(sock, tls is not None))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                await stopping
            await self._drain()
        finally:
            listener.close()
            loading.cancel()
            ticker.cancel()
            await self._server.models.close()
            for connection in list(self._state.connections):
                connection.transport.abort()
            if self._server.spans is not None:
                await asyncio.to_thread(self._server.spans.close)

    def _protocol(self) -> Any:
        config = uvicorn.Config(
            self._server.app(), log_config=None, access_log=False, lifespan="off", ws="none",
            timeout_keep_alive=self._options.keep_alive,  # type: ignore[arg-type]
        )  # fmt: skip
        config.load()
        return partial(LimitedProtocol, self._options, config=config, server_state=self._state, app_state={})

    async def _load(self, sock: socket.socket, tls: bool) -> None:
        for given in self._options.models:
            name, _, model = given.rpartition("=")
            began = time.monotonic()
            try:
                served = await self._server.models.load(model, name or None)
            except Fault as fault:
                raise ConfigError(f"--model {given}: {fault.message}") from None
            for phase, seconds in served.engine.phases.items():
                log.info("phase", extra={"facts": {"phase": phase, "model": served.name, "seconds": round(seconds, 4)}})
            self._phase("model", began, model=served.name)
        settle()
        self._phase("ready", self._began)
        host, port = sock.getsockname()[:2]
        address = f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{port}"
        names = ", ".join(self._server.models.served)
        seconds = time.monotonic() - self._began
        try:
            print(f"headrace: serving {names} on {address} (ready after {seconds:.1f} s)", flush=True)
        except OSError:
            pass  # nobody reads
        if self._server.keys is None and host not in ("127.0.0.1", "::1"):
            log.warning(
                "open to everyone who can reach it: there is no --api-key-file", extra={"facts": {"host": host}}
            )

    def _phase(self, name: str, since: float, **more: Any) -> None:
        log.info("phase", extra={"facts": {"phase": name, **more, "seconds": round(time.monotonic() - since, 4)}})

    # The end

    def _asked_to_stop(self) -> None:
        if self._stop.is_set():
            self._abort.set()
        self._stop.set()

    async def _drain(self) -> None:
        """Let what runs come to its end; new requests are told to go elsewhere."""
        log.info("draining", extra={"facts": {"calls": len(self._server.calls)}})
        self._server.draining = True
        for connection in list(self._state.connections):
            connection.shutdown()
        aborted = asyncio.create_task(self._abort.wait())
        until = time.monotonic() + self._options.drain_timeout
        while self._server.calls and not self._abort.is_set() and time.monotonic() < until:
            await asyncio.wait([aborted], timeout=0.05)
        aborted.cancel()
        if self._server.calls:
            log.warning("aborting", extra={"facts": {"calls": len(self._server.calls)}})
            fault = Fault(503, "the server was stopped before the request was complete", code="shutting_down")
            for call in list(self._server.calls):
                if call.exchange is not None:
                    call.exchange.end(fault)
            until = time.monotonic() + ABORT_SECONDS
            while self._server.calls and time.monotonic() < until:
                await asyncio.sleep(0.02)
        until = time.monotonic() + ABORT_SECONDS
        while self._state.connections and time.monotonic() < until:  # answers that are still on their way out
            for connection in list(self._state.connections):
                connection.shutdown()
            await asyncio.sleep(0.02)
        log.info("stopped")

    # Once a second

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            look_at_all(self._state.connections)
            for stream in list(self._server.streams):
                stream.look(now, self._options.keep_alive_comment)
            self._server.reload_keys()
            await asyncio.sleep(1.0)


def _bind(options: ServeOptions) -> socket.socket:
    """Before anything slow, so that a port in use is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --host or --port"
        ) from None


def _tls(options: ServeOptions) -> ssl.SSLContext | None:
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the certificate {options.tls_cert} with key {options.tls_key} is not usable: {error}"
        ) from None
    return context


def _raise_file_limit() -> None:
    """As many descriptors as this user may have: a connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            log.warning("the limit of open files stays", extra={"facts": {"files": soft}})
