"""`headrace serve`: flags, environment variables and a file, one set of options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

PREFIX = "HEADRACE_SERVE_"


def _option(help: str, *names: str, env: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, envvar=PREFIX + env, show_envvar=False, **more)


def serve(
    model: Annotated[str | None, typer.Argument(help="Model to serve (as with --model).")] = None,
    models: Annotated[
        list[str] | None, _option("One more model; may be given several times.", "--model", "-m", env="MODEL")
    ] = None,
    host: Annotated[str, _option("Address to listen on.", "--host", env="HOST")] = "127.0.0.1",
    port: Annotated[int, _option("Port to listen on; 0 takes a free one.", "--port", env="PORT")] = 8000,
    max_queue: Annotated[int, _option("Sequences that may wait; more are refused (429).", env="MAX_QUEUE")] = 256,
    threads: Annotated[int | None, _option("Threads of the op set [default: one a core].", env="THREADS")] = None,
) -> None:
    """Serve models over HTTP, with OpenAI's API."""
    from .options import ServeOptions
    from .run import run

    names = tuple([*([model] if model else []), *(models or [])]) or ServeOptions().models
    run(ServeOptions(models=names, host=host, port=port, max_queue=max_queue, engine={"threads": threads}))
