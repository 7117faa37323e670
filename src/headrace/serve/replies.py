"""What the server says of a Job: whole answers, and the chunks of a stream. Chunks are put together from bytes that
were encoded once a stream, as this runs once a token."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ..completion import Delta, Output, Sample
from ..text.tokenizer import Tokenizer
from ..types import TokenLogprob
from .bodies import Job

dumps = msgspec.json.Encoder().encode

FINISH = {"cancelled": "stop", "deadline": "length", "error": "error"}  # what clients call them, where it differs


class Replies:
    """The words of one Job. `usage` and `timings` go by what its outputs say at that moment."""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer, request_id: str) -> None:
        self.job, self.model, self.tokenizer = job, model, tokenizer
        self.created = int(time.time())
        self.id = f"{'chatcmpl' if job.chat else 'cmpl'}-{request_id}"
        name = ("chat.completion.chunk" if job.stream else "chat.completion") if job.chat else "text_completion"
        self.head = {"id": self.id, "object": name, "created": self.created, "model": model}
        self._head = b"data: " + dumps(self.head)[:-1] + b","
        self._prefix = self._head + b'"choices":[{"index":'
        self._roles = [not job.chat] * (len(job.prompts) * job.choices)  # told already
        self._offsets = [0] * len(self._roles)  # of legacy logprobs, in characters

    # Streams

    def chunk(
        self, choice: int, text: str, delta: Delta, entries: Sequence[TokenLogprob | None], finish: str | None,
        usage: dict[str, Any] | None, timings: dict[str, Any] | None, tool_calls: list[dict[str, Any]] | None = None,
        first: int | None = None,
    ) -> bytes:  # fmt: skip
        """One event of a stream. `finish` as clients call it; `usage` and `timings` where they are shown. `entries` are
        the log-probabilities to show, `first` the first token of a prompt that is among them."""
        if self.job.chat:
            content = (
                b'"content":' + dumps(text) if tool_calls is None or text else b'"tool_calls":' + dumps(tool_calls)
            )
            if tool_calls is not None and text:
                content += b',"tool_calls":' + dumps(tool_calls)
            if not self._roles[choice]:
                self._roles[choice] = True
                content = b'"role":"assistant",' + content
            elif finish is not None and not text and tool_calls is None:
                content = b""
            middle = b',"delta":{' + content + b'},"logprobs":'
        else:
            middle = b',"text":' + dumps(text) + b',"logprobs":'
        logprobs = b"null"
        if self.job.top_logprobs is not None and entries:
            logprobs = dumps(self.logprobs(choice, entries, first))
        parts = [
            self._prefix, b"%d" % choice, middle, logprobs,
            b',"finish_reason":', b"null" if finish is None else dumps(finish),
        ]  # fmt: skip
        if self.job.token_ids:
            parts += [b',"token_ids":', dumps(delta.token_ids)]
        parts.append(b"}]")
        if usage is not None:
            parts += [b',"usage":', dumps(usage)]
        if timings is not None:
            parts += [b',"timings":', dumps(timings)]
        parts.append(b"}\n\n")
        return b"".join(parts)

    def usage_chunk(self, usage: dict[str, Any], timings: dict[str, Any]) -> bytes:
        """The last event before [DONE], where usage was asked for."""
        return self._head + b'"choices":[],"usage":' + dumps(usage) + b',"timings":' + dumps(timings) + b"}\n\n"

    # Whole answers

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": choices, "usage": usage, "timings": timings, "system_fingerprint": None}

    def choice(
        self, index: int, output: Output, sample: Sample, text: str, finish: str,
        tool_calls: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A whole choice. `text` is the sample's, as the parser left it."""
        job = self.job
        entries: list[TokenLogprob | None] = list(sample.logprobs)
        if job.echo:
            text = self.tokenizer.decode(output.prompt_token_ids) + text
            entries = [None, *(output.prompt_logprobs or ()), *entries]
        logprobs = None
        if job.top_logprobs is not None:
            logprobs = self.logprobs(index, entries, first=output.prompt_token_ids[0] if job.echo else None)
        choice: dict[str, Any] = {"index": index}
        if job.chat:
            choice["message"] = {"role": "assistant", "content": text or None if tool_calls else text, "refusal": None}
            if tool_calls:
                choice["message"]["tool_calls"] = tool_calls
        else:
            choice["text"] = text
        choice |= {"logprobs": logprobs, "finish_reason": finish}
        if job.token_ids:
            choice |= {"token_ids": list(sample.token_ids), "prompt_token_ids": list(output.prompt_token_ids)}
        return choice

    # Parts

    def logprobs(self, choice: int, entries: Sequence[TokenLogprob | None], first: int | None = None) -> dict[str, Any]:
        """OpenAI's two shapes. Where a prompt is echoed, `first` is its first token, of which nothing is known."""
        if self.job.chat:
            return {"content": [self._chat_entry(entry) for entry in entries if entry], "refusal": None}
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            text = self._text(entry.token if entry else first or 0)
            shown["tokens"].append(text)
            shown["token_logprobs"].append(_number(entry.logprob) if entry else None)
            top = {self._text(token): _number(value) for token, value in entry.top} if entry else None
            shown["top_logprobs"].append(top)
            shown["text_offset"].append(self._offsets[choice])
            self._offsets[choice] += len(text)
        return shown

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in entry.top]
        return {**self._named(entry.token, entry.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(raw)}

    def scored(self, entry: TokenLogprob) -> dict[str, Any]:
        """One token of a prompt, in a score."""
        top = [{"id": token, **self._named(token, value)} for token, value in entry.top]
        return {"id": entry.token, **self._named(entry.token, entry.logprob), "rank": entry.rank, "top_logprobs": top}

    def _text(self, token: int) -> str:
        """A token's text; one that is not whole characters is told as its bytes."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0


def usage_of(outputs: Sequence[Output]) -> dict[str, Any]:
    """Tokens of all prompts (each once) and of all samples that were made."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(sample.token_ids) for output in outputs for sample in output.samples)
    cached = sum(min(output.timings.cached_tokens, len(output.prompt_token_ids)) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def new_request_id() -> str:
    return secrets.token_hex(12)
