"""The server's process: from options to a listening socket, and to a quiet end."""

from __future__ import annotations

import logging

import uvicorn
import uvloop

from .app import Server
from .options import ServeOptions

log = logging.getLogger("headrace.serve")


def run(options: ServeOptions) -> None:
    """Serve until told to stop."""
    server = Server(options)
    config = uvicorn.Config(
        server.app(), host=options.host, port=options.port, log_level="warning", access_log=False, lifespan="off",
        http="httptools", loop="uvloop", ws="none", server_header=False, proxy_headers=False,
    )  # fmt: skip

    async def main() -> None:
        for name in options.models:
            await server.models.load(name)
        try:
            await uvicorn.Server(config).serve()
        finally:
            await server.models.close()

    uvloop.run(main())
