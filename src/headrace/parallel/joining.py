"""What both sides of a worker's join need: the address and the shared secret."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

from ..errors import ConfigError
from .handshake import MIN_SECRET_BYTES

MAX_SECRET_BYTES = 4096
SALT_BYTES = 16
JOIN_LABEL = "headrace worker"


def parse_address(text: str, name: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[host]:port". ConfigError names what the address is for."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{name} must be HOST:PORT, as in 10.0.0.1:5000, got {text!r:.80}")
    return host, int(port)


def read_secret(path: str | Path) -> bytes:
    """A secret from its file, without the white space around it. ConfigError where the file cannot be read, is open to
    all users of the machine, or holds too few bytes or too many."""
    path = Path(path).expanduser()
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its other end
            raise ConfigError(f"the secret file {path} is not a regular file")
        if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(f"the secret file {path} is open to all users (mode {mode:o}); chmod 600 {path}")
        with open(path, "rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the secret file {path} cannot be read: {error.strerror}") from None
    if not MIN_SECRET_BYTES <= len(secret.strip()) <= len(secret) <= MAX_SECRET_BYTES:
        raise ConfigError(
            f"a secret has from {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, that of {path} has "
            f"{len(secret.strip())}; make one, as in: (umask 077; openssl rand -hex 32 > {path})"
        )
    return secret.strip()


def channel_secret(secret: bytes, salt: bytes) -> bytes:
    """The secret of one run's channels, which differs from that of every other run."""
    return hmac.digest(secret, b"headrace channels" + salt, "sha256")
