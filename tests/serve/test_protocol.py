"""One connection, without a server behind it."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import weakref
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from headrace.serve.options import ServeOptions
from headrace.serve.protocol import LimitedProtocol


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


async def test_a_connection_that_is_reset_is_let_go_of_at_once() -> None:
    """And not when it would have been idle for too long: under load that would be many megabytes."""
    config = uvicorn.Config(hello, log_config=None, access_log=False, lifespan="off", ws="none", timeout_keep_alive=60)
    config.load()
    connections: list[weakref.ref[LimitedProtocol]] = []

    def connect() -> LimitedProtocol:
        protocol = LimitedProtocol(
            ServeOptions(models=("tiny",)), config=config, server_state=ServerState(), app_state={}
        )
        connections.append(weakref.ref(protocol))
        return protocol

    server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    async with server:
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert (await reader.readuntil(b"hi")).startswith(b"HTTP/1.1 200")
            client = writer.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no orderly end
            writer.transport.abort()
        for _ in range(100):
            gc.collect()
            if not any(connection() for connection in connections):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{sum(connection() is not None for connection in connections)} of 3 are still held")
