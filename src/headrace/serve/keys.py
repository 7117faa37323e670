"""API keys from a file: one a line, blank lines and lines that begin with # left out."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import stat
from pathlib import Path

from ..errors import ConfigError

MAX_FILE = 1 << 20
MIN_KEY = 8  # characters


class Keys:
    """Kept as hashes. `admits` takes as long for a wrong key as for any right one."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._stamp: tuple[int, int, int] | None = None
        self._hashes: list[bytes] = []
        self.reload()

    def reload(self) -> bool:
        """Read the file again if it has changed; whether it had. ConfigError where it cannot be read or holds no key:
        the keys of before stay."""
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return False
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its other end
                raise ConfigError(f"the key file {self._path} is not a regular file")
            with open(self._path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise ConfigError(f"the key file {self._path} cannot be read: {error.strerror}") from None
        if len(data) > MAX_FILE:
            raise ConfigError(f"the key file {self._path} is larger than {MAX_FILE} bytes")
        lines = [line.strip() for line in data.splitlines()]
        keys = [line for line in lines if line and not line.startswith(b"#")]
        if not keys or min(map(len, keys)) < MIN_KEY:
            raise ConfigError(
                f"the key file {self._path} must hold at least one key, each of {MIN_KEY} characters or more"
            )
        self._hashes, self._stamp = [hashlib.sha256(key).digest() for key in keys], stamp
        return True

    def admits(self, authorization: bytes) -> bool:
        """Whether the Authorization header's value holds a key: as a bearer token, or as the password of basic
        authentication, which browsers know."""
        scheme, _, rest = authorization.strip().partition(b" ")
        rest = rest.strip()
        if scheme.lower() == b"basic":
            try:
                rest = base64.b64decode(rest, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != b"bearer":
            return False
        given = hashlib.sha256(rest).digest()
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(given, known)
        return found


def read_key(path: Path | None) -> str | None:
    """The first line of a key file that is neither blank nor a comment. ConfigError where there is none."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file.read(MAX_FILE).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"the key file {path} holds no key")
    return keys[0]
