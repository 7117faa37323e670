"""A worker that joins a coordinator of another host, for one rank:
`python -m headrace.guest_process ADDRESS SECRET_FILE NAME [MODEL_DIR]`. `headrace worker` starts it, again and again.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec

from .errors import HeadraceError
from .processes import die_with_parent
from .workers.joining import join

FAILED = 3  # exit code: the rank could not start, and would not at once either


def serve(address: str, secret_file: str, name: str, model_dir: str = "") -> int:
    """Join, and obey until the coordinator hangs up. The process's exit code."""
    # Slow to import; and nobody waits yet.
    from . import assemble_split  # noqa: F401
    from .worker_process import obey

    joined = join(address, secret_file, name)
    start = joined.start
    here = Path(model_dir, Path(start.model).name)
    if model_dir and here.exists():
        start = msgspec.structs.replace(start, model=str(here))
    return 0 if obey(joined.link, start, joined) else FAILED


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        sys.exit(serve(*sys.argv[1:]))
    except HeadraceError as error:
        print(f"headrace worker: {error}", file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
