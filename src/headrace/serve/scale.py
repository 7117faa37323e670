"""`headrace scale`: asks a running server for more or fewer replicas of a stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, HeadraceError

ANSWER_SECONDS = 30.0
MAX_ANSWER = 1 << 22


def scale(
    url: Annotated[str, typer.Argument(help="The server, as in http://127.0.0.1:8000.")],
    stage: Annotated[int, typer.Option(help="The stage's number, from 0.")],
    replicas: Annotated[int, typer.Option(help="How many it is to have, from 1 to 64.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="By the server's name; its default if not given.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File whose first line is a key for admin routes.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Have so many replicas of a stage of a model that a server runs split (serve --plan).

    New replicas start and join while requests run; those that are too many leave once they have done what they have.
    """
    from .keys import read_key

    answer = ask(url, {"stage": stage, "replicas": replicas, "model": model}, read_key(api_key_file))
    if as_json:
        print(json.dumps(answer))
        return
    for each in answer["stages"]:
        first, last = each["layers"]
        print(f"stage {each['stage']}  layers {first}-{last}  {each['ready']} of {len(each['replicas'])} ready")
        for one in each["replicas"]:
            again = f"  restarts {one['restarts']}" if one["restarts"] else ""
            print(f"  replica {one['replica']}  {one['state']}  sequences {one['sequences']}{again}")


def ask(url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """The answer of POST /admin/scale. HeadraceError where there is none, or it is an error."""
    import urllib.error  # not before it is needed: it takes as long as the rest of the command line
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"a server's URL begins with http:// or https://, got {url!r:.80}")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url.rstrip("/") + "/admin/scale", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return json.loads(response.read(MAX_ANSWER))
    except urllib.error.HTTPError as error:
        raise HeadraceError(f"{url} answered {error.code}: {_message(error.read(MAX_ANSWER), error.reason)}") from None
    except (OSError, ValueError) as error:
        raise HeadraceError(f"{url} cannot be asked: {getattr(error, 'reason', error)}") from None


def _message(answer: bytes, reason: str) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reason
