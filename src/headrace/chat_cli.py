"""The terminal chat: a conversation that always fits the model's context, and the loop that talks."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import CapacityError, HeadraceError, RequestError
from .frontend import Frontend
from .types import SamplingParams

if TYPE_CHECKING:
    from .llm import LLM

Message = dict[str, Any]

HISTORY_LINES = 1000
# What would move the cursor or change the terminal is shown as nothing; tab and newline stay.
_CONTROLS = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\t\n"}

HELP = """\
/system [TEXT]        show or replace the system message (starts the conversation again)
/reset                forget the conversation
/retry                drop the last answer and ask again
/params [NAME=VALUE]  show or change sampling, as in /params temperature=0.7 top_p=0.9
/save FILE            write the conversation as JSON
/help                 this list
/exit                 leave, as does Ctrl-D
A line that ends with \\ goes on in the next. Ctrl-C stops an answer."""


def printable(text: str) -> str:
    """`text` without control characters, so that what a model writes cannot drive a terminal."""
    return text.translate(_CONTROLS)


class Conversation:
    """Messages that fit a context: the oldest exchanges leave first, the system message and the last question stay.

    `count` gives the prompt tokens of a list of messages; a prompt of at most `limit` tokens leaves room for an answer.
    """

    def __init__(self, count: Callable[[list[Message]], int], limit: int, system: str | None = None) -> None:
        self._count, self._limit = count, limit
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *self.turns]

    def ask(self, text: str) -> int:
        """Add a question; how many old messages had to leave. CapacityError, and no change, where it cannot fit."""
        kept = [*self.turns, {"role": "user", "content": text}]
        head = self.messages[: len(self.messages) - len(self.turns)]
        dropped = 0
        while (tokens := self._count([*head, *kept[dropped:]])) > self._limit:
            dropped += 1
            while dropped < len(kept) and kept[dropped]["role"] != "user":
                dropped += 1
            if dropped >= len(kept):
                raise CapacityError(
                    f"the message takes {tokens} tokens; at most {self._limit} leave room for an answer"
                )
        self.turns = kept[dropped:]
        return dropped

    def answer(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> str | None:
        """Remove the last question and its answer, and return the question; None where there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def reset(self) -> None:
        self.turns.clear()


def with_assignments(params: SamplingParams, words: Iterable[str]) -> SamplingParams:
    """`params` with NAME=VALUE words applied; a value is JSON, or text where it is not. RequestError on a bad one."""
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in params.__struct_fields__:
            raise RequestError(f"{word!r} is not NAME=VALUE with a NAME of {', '.join(params.__struct_fields__)}")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            changes[name] = value
    return msgspec.structs.replace(params, **changes)


class Chat:
    """The loop of `headrace chat`. Reads lines with history where there is a terminal, plainly where there is none."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm, self._params = llm, params
        self._frontend = Frontend(llm.tokenizer, llm.spec.vocab_size)
        self._conversation = Conversation(
            self._count, llm.config.max_context - min(64, llm.config.max_context // 4), system
        )
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._interruptible = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": self._reset,
            "/retry": self._retry,
            "/params": self._set_params,
            "/save": self._save,
            "/help": lambda _: self._say(HELP),
        }

    def loop(self) -> None:
        """Talk until /exit or the end of the input."""
        history = _history_file() if self._terminal else None
        if self._terminal:
            self._say("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.")
        handler = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            while (line := self._read()) is not None and line.strip() != "/exit":
                self._take(line.strip())
        finally:
            signal.signal(signal.SIGINT, handler)
            if history is not None:
                _save_history(history)

    @contextmanager
    def _interrupted(self) -> Iterator[None]:
        """Ctrl-C ends the block with one KeyboardInterrupt. A second one that comes close behind would end the chat; it
        does nothing, as elsewhere."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _on_interrupt(self, *_: object) -> None:
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    def _read(self) -> str | None:
        """The next message, which may go over several lines; None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                with self._interrupted():
                    line = input(("... " if lines else ">>> ") if self._terminal else "")
            except EOFError:
                if self._terminal:
                    print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                print()
                lines.clear()
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if not line:
                return
            if name in self._commands:
                self._commands[name](rest.strip())
            elif line.startswith("/"):
                self._say(f"there is no command {name}; /help lists them")
            else:
                self._ask(line)
        except HeadraceError as error:
            self._say(f"! {error}")

    def _ask(self, text: str) -> None:
        dropped = self._conversation.ask(text)
        if dropped:
            limit = self._llm.config.max_context
            self._say(f"(the {dropped} oldest messages left: the context of {limit} tokens is full)")
        answer = ""
        try:
            with self._interrupted():
                for piece in self._llm.stream_chat(self._conversation.messages, self._params):
                    answer += piece.text
                    sys.stdout.write(printable(piece.text) if self._terminal else piece.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" (stopped)")
        except HeadraceError:
            self._conversation.take_back()
            raise
        print()
        self._conversation.answer(answer)

    def _count(self, messages: list[Message]) -> int:
        return len(self._frontend.chat_ids(messages))

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._conversation.reset()
        self._say(f"system: {self._conversation.system or '(none)'}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._say("(the conversation is empty)")

    def _retry(self, _: str) -> None:
        question = self._conversation.take_back()
        if question is None:
            self._say("there is no question to ask again")
        else:
            self._ask(question)

    def _set_params(self, text: str) -> None:
        self._params = with_assignments(self._params, text.split())
        changed = msgspec.to_builtins(self._params)
        self._say(" ".join(f"{name}={json.dumps(value)}" for name, value in changed.items()))

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs a file name")
        try:
            Path(name).expanduser().write_text(
                json.dumps(self._conversation.messages, ensure_ascii=False, indent=2) + "\n"
            )
        except OSError as error:
            raise RequestError(f"cannot write {name}: {error.strerror}") from None
        self._say(f"(saved {len(self._conversation.messages)} messages to {name})")

    def _say(self, text: str) -> None:
        print(text, file=sys.stdout if self._terminal else sys.stderr, flush=True)


def _history_file() -> Path | None:
    """Turn on line editing, and bring back the lines of earlier chats. None where there is no readline."""
    try:
        import readline
    except ImportError:
        return None
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "headrace" / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    try:
        readline.read_history_file(path)
    except OSError:
        pass  # the first chat, or a file of another program's: start with nothing
    return path


def _save_history(path: Path) -> None:
    import readline

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)
    except OSError as error:
        print(f"headrace: cannot keep the history in {path}: {error.strerror}", file=sys.stderr)
