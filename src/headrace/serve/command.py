"""`headrace serve`: flags, environment variables and a file, for one set of options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

PREFIX = "HEADRACE_SERVE_"
MAX_FILE = 1 << 20

NETWORK, LIMITS, ENGINE, OPERATION = "Network", "Limits", "Engine", "Operation"


def _option(panel: str, help: str, flag: str, *more: str, **other: Any) -> Any:
    """An option that is also an environment variable: --max-queue is HEADRACE_SERVE_MAX_QUEUE."""
    variable = PREFIX + flag.partition("/")[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(flag, *more, help=help, envvar=variable, show_envvar=False, rich_help_panel=panel, **other)


def _read_file(context: typer.Context, path: str | None) -> str | None:
    """Values of a YAML file become the flags' defaults: a flag or a variable that is given comes before the file."""
    if path is None or context.resilient_parsing:
        return path
    import yaml

    try:
        with open(Path(path).expanduser(), "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"--config {path} is larger than {MAX_FILE} bytes")
    try:
        values = yaml.safe_load(data) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from None
    known = {name: parameter for parameter in context.command.params for name in _names(parameter)}
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold flags and their values, as in 'port: 8000'")
    defaults: dict[str, Any] = {}
    for name, value in values.items():
        parameter = known.get(str(name).replace("_", "-"))
        if parameter is None or parameter.name in ("config", "help"):
            raise ConfigError(f"--config {path} names {name!r:.80}, which is no flag; see headrace serve --help")
        many = parameter.multiple  # type: ignore[attr-defined]
        defaults[str(parameter.name)] = [value] if many and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _names(parameter: Any) -> list[str]:
    return [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]


def serve(
    model: Annotated[
        str | None, typer.Argument(help="A model: alias, .gguf file, Hugging Face folder or hf:org/name[:file].")
    ] = None,
    models: Annotated[
        list[str] | None,
        _option(ENGINE, "One more model, or NAME=MODEL to name it; may be given several times.", "--model", "-m"),
    ] = None,
    config: Annotated[
        str | None,
        _option(
            OPERATION, "YAML file with any of these flags: port: 8000.", "--config", callback=_read_file, is_eager=True
        ),
    ] = None,
    host: Annotated[str, _option(NETWORK, "Address to listen on.", "--host")] = "127.0.0.1",
    port: Annotated[int, _option(NETWORK, "Port to listen on; 0 takes a free one.", "--port")] = 8000,
    api_key_file: Annotated[
        str | None,
        _option(NETWORK, "File of keys that clients need, one a line; read again when it changes.", "--api-key-file"),
    ] = None,
    admin_key_file: Annotated[
        str | None, _option(NETWORK, "File of keys for /admin/ routes, which are off without it.", "--admin-key-file")
    ] = None,
    tls_cert: Annotated[str | None, _option(NETWORK, "Certificate chain, PEM.", "--tls-cert")] = None,
    tls_key: Annotated[str | None, _option(NETWORK, "Private key, PEM.", "--tls-key")] = None,
    cors_origin: Annotated[
        list[str] | None,
        _option(NETWORK, "Origin whose pages may ask; * for all. May be given several times.", "--cors-origin"),
    ] = None,
    max_queue: Annotated[int, _option(LIMITS, "Sequences that may wait; more are refused (429).", "--max-queue")] = 256,
    max_connections: Annotated[int, _option(LIMITS, "Connections at once.", "--max-connections")] = 1024,
    max_body_bytes: Annotated[int, _option(LIMITS, "Largest request body.", "--max-body-bytes")] = 8 << 20,
    max_header_bytes: Annotated[int, _option(LIMITS, "Largest request head.", "--max-header-bytes")] = 32 << 10,
    header_timeout: Annotated[float, _option(LIMITS, "Seconds for a request's head.", "--header-timeout")] = 10.0,
    body_timeout: Annotated[float, _option(LIMITS, "Seconds for a request's body.", "--body-timeout")] = 30.0,
    write_timeout: Annotated[
        float, _option(LIMITS, "Seconds for which a client may leave its answer unread.", "--write-timeout")
    ] = 30.0,
    keep_alive: Annotated[float, _option(LIMITS, "Seconds that an idle connection is kept.", "--keep-alive")] = 75.0,
    keep_alive_comment: Annotated[
        float, _option(LIMITS, "Seconds between comments in a silent stream.", "--keep-alive-comment")
    ] = 10.0,
    request_timeout: Annotated[
        float, _option(LIMITS, "Seconds for a request that names no deadline; 0 for no limit.", "--request-timeout")
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        _option(OPERATION, "Seconds for requests to end after SIGTERM; a second one ends them.", "--drain-timeout"),
    ] = 60.0,
    log_file: Annotated[str | None, _option(OPERATION, "File for the log; if not given, stderr.", "--log-file")] = None,
    log_level: Annotated[str, _option(OPERATION, "debug, info, warning or error.", "--log-level")] = "info",
    otel_endpoint: Annotated[
        str | None,
        _option(OPERATION, "Collector of OpenTelemetry's spans (OTLP over HTTP): http://host:4318.", "--otel-endpoint"),
    ] = None,
    max_restarts: Annotated[
        int, _option(OPERATION, "Restarts of an engine within a minute before it is given up.", "--max-restarts")
    ] = 100,
    tool_parser: Annotated[
        str, _option(ENGINE, "How models write tool calls: auto, hermes, llama3 or mistral.", "--tool-parser")
    ] = "auto",
    kernels: Annotated[str, _option(ENGINE, "Op set: auto, native or reference.", "--kernels")] = "auto",
    threads: Annotated[
        int | None, _option(ENGINE, "Threads of the op set; if not given, one a core.", "--threads", show_default=False)
    ] = None,
    plan: Annotated[
        str | None,
        _option(ENGINE, 'Split the model, as in "0-14 x2 | 15-29", "2x1x2" or a file.', "--plan", show_default=False),
    ] = None,
    listen: Annotated[
        str | None,
        _option(ENGINE, "host:port where workers of a plan's other hosts join.", "--listen", show_default=False),
    ] = None,
    secret_file: Annotated[
        str | None, _option(ENGINE, "File of the secret that such workers know.", "--secret-file", show_default=False)
    ] = None,
    activations: Annotated[
        str, _option(ENGINE, "int8 scales of activations: group or row.", "--activations")
    ] = "group",
    kv_dtype: Annotated[
        str, _option(ENGINE, "Keys and values as float32, float16, bfloat16 or int8.", "--kv-dtype")
    ] = "auto",
    kv_memory: Annotated[
        int | None,
        _option(
            ENGINE,
            "Bytes for keys and values; if not given, by what memory is free.",
            "--kv-memory",
            show_default=False,
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        _option(
            ENGINE, "Tokens of the longest sequence; if not given, the model's.", "--max-context", show_default=False
        ),
    ] = None,
    max_sequences: Annotated[int, _option(ENGINE, "Sequences that run at once.", "--max-sequences")] = 64,
    max_batch_tokens: Annotated[int, _option(ENGINE, "Tokens of a step.", "--max-batch-tokens")] = 512,
    page_size: Annotated[int, _option(ENGINE, "Tokens of a page.", "--page-size")] = 32,
    policy: Annotated[str, _option(ENGINE, "Admission: fcfs, longest-prefix or static.", "--policy")] = "fcfs",
    prefix_cache: Annotated[
        bool, _option(ENGINE, "Share the pages of equal prefixes.", "--prefix-cache/--no-prefix-cache")
    ] = True,
) -> None:
    """Serve models over HTTP, with OpenAI's API.

    Every flag is also an environment variable, HEADRACE_SERVE_ and its name: HEADRACE_SERVE_MAX_QUEUE=64. A flag comes
    before a variable, and a variable before the file of --config.
    """
    from .options import ServeOptions
    from .run import run

    names: list[str] = [*([model] if model else []), *(models or [])]
    run(
        ServeOptions(
            models=tuple(names) or ServeOptions().models,
            host=host,
            port=port,
            api_key_file=api_key_file,
            admin_key_file=admin_key_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
            cors_origins=tuple(cors_origin or ()),
            max_queue=max_queue,
            max_connections=max_connections,
            max_body_bytes=max_body_bytes,
            max_header_bytes=max_header_bytes,
            header_timeout=header_timeout,
            body_timeout=body_timeout,
            write_timeout=write_timeout,
            keep_alive=keep_alive,
            keep_alive_comment=keep_alive_comment,
            request_timeout=request_timeout,
            drain_timeout=drain_timeout,
            log_file=log_file,
            log_level=log_level,
            otel_endpoint=otel_endpoint,
            max_restarts=max_restarts,
            tool_parser=tool_parser,
            engine={
                "kernels": kernels,
                "threads": threads,
                "plan": plan,
                "listen": listen,
                "secret_file": secret_file,
                "activations": activations,
                "kv_dtype": kv_dtype,
                "kv_memory": kv_memory,
                "max_context": max_context,
                "max_sequences": max_sequences,
                "max_batch_tokens": max_batch_tokens,
                "page_size": page_size,
                "policy": policy,
                "prefix_cache": prefix_cache,
            },
        )
    )
