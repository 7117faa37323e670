"""Whether a grammar can be compiled at all, tried in a process of its own: compiling knows no limit of time or memory
that holds for every grammar, and one that nests deeply overruns the stack. What dies there harms nobody.

`python -m headrace.grammar.check` reads a GrammarSpec a line, as JSON, and answers each with a line.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import RequestError
from ..processes import die_with_parent
from ..types import GrammarSpec

if TYPE_CHECKING:
    import subprocess

SECONDS = 5.0
BYTES = 256 << 20
STACK = 2 << 20  # a quarter of what the threads have that compile it after this
MAX_PROBLEM = 300
WALK = 8  # bytes of a text that matches
STEP_SECONDS = 0.1  # for each of them

# One space after ":" and ",", and no other: what may be repeated at will, a small model repeats for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Checked(msgspec.Struct, frozen=True):
    """The answer: the grammar in llguidance's own form, and about how many bytes it takes compiled; or a problem."""

    grammar: str = ""
    size: int = 0
    problem: str | None = None


class Checker:
    """Checks one grammar at a time, in a process that is started when it is first needed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, spec: GrammarSpec) -> Checked:
        """Takes SECONDS at most. Raises RequestError where the grammar is malformed, or too much."""
        with self._lock:
            try:
                answer = self._ask(spec)
            except TimeoutError:
                self._stop()
                raise RequestError(
                    f"the {spec.kind} takes more than {SECONDS:g} s to compile; make it simpler"
                ) from None
            except OSError:
                self._stop()
                raise RequestError(
                    f"the {spec.kind} nests too deeply or takes more than {BYTES >> 20} MiB to compile; make it simpler"
                ) from None
        if answer.problem is not None:
            raise RequestError(f"the {spec.kind} cannot be used: {answer.problem}")
        return answer

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, spec: GrammarSpec) -> Checked:
        import subprocess

        if self._process is None or self._process.poll() is not None:
            self._stop()
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if not self._read_line(30.0):  # it says so when it is ready
                raise BrokenPipeError
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._read_line(SECONDS), type=Checked)

    def _read_line(self, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        stdout, end, line = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(stdout, 1 << 20)
            if not piece:
                raise BrokenPipeError
            line += piece
        return line

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            try:
                self._process.communicate()
            except OSError:
                pass
            self._process = None


def limits() -> Any:
    """What llguidance may spend on a grammar at first, and on each token."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_max_items=20_000, step_lexer_fuel=100_000, max_lexer_states=100_000)


def problem_of(matcher: Any) -> str | None:
    """What is wrong with a matcher, in a line or few; None where nothing is."""
    if not matcher.is_error():
        return None
    text = matcher.get_error().partition("\n<state>")[0].strip()
    if text.startswith("NoExtension"):
        return "no text can match it"
    where, found, reason = text.partition("regex parse error:")  # the whole expression follows, then the reason
    return f"{where[:60]}{found} {reason.rpartition('error: ')[2]}"[:MAX_PROBLEM] if found else text[:MAX_PROBLEM]


def lowered(spec: GrammarSpec) -> str:
    """The grammar in llguidance's own form. ValueError where it is malformed; most of that shows only later."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if spec.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(spec.text, defaults=JSON_STYLE)  # type: ignore[arg-type]
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    return LLMatcher.grammar_from_lark(any_to_lark(spec.text))


NAMED = 257
TOKEN_IDS = re.compile(r"<\[\^?[0-9,\s-]{1,1000}\]>")  # in a grammar


class _Bytes:
    """A vocabulary of single bytes, as llguidance wants one described, and one token for all that a grammar names by
    their ids: those are the model's."""

    eos_token_id, bos_token_id = 256, None
    tokens = [bytes((byte,)) for byte in range(256)] + [b"<end>", b"<named>"]
    special_token_ids = [256, NAMED]
    is_tokenizer_wrapper = True

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _checked(spec: GrammarSpec, vocabulary: Any) -> Checked:
    from llguidance import LLMatcher

    before = _resident_bytes()
    try:
        grammar = lowered(spec)
    except Exception as error:
        return Checked(problem=re.sub(r"\s+", " ", str(error))[:MAX_PROBLEM])
    tried = TOKEN_IDS.sub(f"<[{NAMED}]>", spec.text) if spec.kind == "grammar" else None
    tried = grammar if tried in (None, spec.text) else lowered(msgspec.structs.replace(spec, text=tried))
    matcher = LLMatcher(vocabulary, tried, log_level=0, limits=limits())
    problem = problem_of(matcher)
    for _ in range(WALK):  # what a grammar costs may show only on the way
        problem = problem or _step(matcher)
    return Checked(grammar, max(0, _resident_bytes() - before), problem)


def _step(matcher: Any) -> str | None:
    """Take the first byte, or named token, that may follow; what is wrong with that."""
    began = time.monotonic()
    mask = matcher.compute_bitmask()
    follows = next((token for token in (*range(256), NAMED) if mask[token // 8] >> token % 8 & 1), None)
    if follows is not None and not matcher.is_error():
        matcher.consume_token(follows)
    problem = problem_of(matcher)
    return problem or ("it takes too much work a token" if time.monotonic() - began > STEP_SECONDS else None)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _serve() -> None:
    from llguidance import LLTokenizer

    vocabulary = LLTokenizer(_Bytes())  # type: ignore[arg-type]
    print("ready", flush=True)
    try:
        for line in sys.stdin.buffer:
            answer = _checked(msgspec.json.decode(line, type=GrammarSpec), vocabulary)
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(0)  # who asked has died, and nobody is to read of that


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    most = used + (256 << 20) + BYTES  # the room for what is mapped and not used
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
