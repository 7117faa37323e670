"""The models that a server offers, by the names that clients use."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from ..assemble import EncoderModel, open_any
from ..async_llm import AsyncLLM
from ..errors import ConfigError
from ..workers.wire import Status
from .async_encoder import AsyncEncoder
from .faults import Fault
from .metrics import Collector, Metrics


@dataclass
class Served:
    """One model: its engine, and its side of the metrics."""

    name: str
    engine: AsyncLLM | AsyncEncoder
    collector: Collector
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def llm(self) -> AsyncLLM:
        """The engine of a model that generates; Fault 400 for an encoder."""
        if isinstance(self.engine, AsyncLLM):
            return self.engine
        raise Fault(400, f"model {self.name!r} is an encoder: it makes embeddings (/v1/embeddings) and generates "
                    "no text", param="model", code="unsupported_model")  # fmt: skip

    @property
    def encoder(self) -> AsyncEncoder:
        """The engine of an encoder; Fault 400 for a model that generates."""
        if isinstance(self.engine, AsyncEncoder):
            return self.engine
        raise Fault(400, f"model {self.name!r} generates text and makes no embeddings; take an encoder", param="model",
                    code="unsupported_model")  # fmt: skip

    @property
    def state(self) -> str:
        engine = self.engine
        return "stalled" if engine.state == "ready" and engine.silence > STALL_SECONDS else engine.state

    @property
    def status(self) -> Status | None:
        """How the stages of a split model stand, while it runs."""
        return self.engine.status if isinstance(self.engine, AsyncLLM) and self.engine.state == "ready" else None

    @property
    def lost_stage(self) -> str | None:
        """A stage of a split model that has no replica."""
        missing = self.status.missing if self.status else []
        return f"stage {missing[0]}" if missing else None

    @property
    def condition(self) -> str:
        """The state, or what a model that is ready lacks."""
        state = self.state
        return f"{self.lost_stage} has no replica" if state == "ready" and self.lost_stage else state

    @property
    def max_model_len(self) -> int:
        """Tokens that the model takes. Once it is loaded."""
        engine = self.engine
        return engine.config.max_context if isinstance(engine, AsyncLLM) else engine.spec.context_length

    def capacity(self, max_queue: int) -> int:
        """Sequences, or an encoder's requests, that may be here at once, running and waiting."""
        engine = self.engine
        most = engine.config.max_sequences if isinstance(engine, AsyncLLM) else engine.max_sequences
        return most + max_queue


MAX_NAME = 256
STALL_SECONDS = 30.0  # of silence with work to do, after which a model does not count as healthy


class Models:
    """Loads, finds and unloads. The first model is the one that a request without a name gets."""

    def __init__(self, metrics: Metrics, settings: dict[str, Any]) -> None:
        self._metrics, self._settings = metrics, settings
        self.served: dict[str, Served] = {}

    async def load(self, model: str, name: str | None = None) -> Served:
        """Load one more. Fault 409 where the name is taken; raises what loading raised."""
        name = name or model
        if not name.isprintable() or len(name) > MAX_NAME:
            raise Fault(400, f"a model's name must be at most {MAX_NAME} characters that print, got {name!r:.80}",
                        param="name")  # fmt: skip
        if (before := self.served.get(name)) is not None and before.state not in ("dead", "closed"):
            raise Fault(409, f"a model named {name!r} is loaded already; unload it first", code="model_exists")
        collector = self._metrics.collector(name)
        served = self.served[name] = Served(name, AsyncLLM(model, **self._settings), collector)
        try:
            if isinstance(await asyncio.to_thread(open_any, model), EncoderModel):
                if self._settings.get("plan") is not None:
                    raise ConfigError(f"{model} is an encoder, which is not split; leave the plan out")
                served.engine = AsyncEncoder(model, **self._settings)
            if self.served.get(name) is not served:
                raise Fault(409, f"model {name!r} was unloaded while it was loading", code="model_unloaded")
            served.engine.observer = collector
            await served.engine.start()
        except BaseException:
            if self.served.get(name) is served:
                del self.served[name]
            raise
        self._metrics.ready.labels(name).set(1)
        return served

    async def unload(self, name: str) -> None:
        """Close a model; its requests end with an error."""
        served = self.find(name)
        del self.served[served.name]
        self._metrics.ready.labels(served.name).set(0)
        self._metrics.stages.forget(served.name)
        await served.engine.close()

    def find(self, name: str | None) -> Served:
        """Fault 404 where there is none of that name."""
        if name is None or name == "":
            if self.served:
                return next(iter(self.served.values()))
            raise Fault(503, "no model is loaded", code="model_not_ready")
        try:
            return self.served[name]
        except KeyError:
            raise Fault(
                404, f"there is no model {name[:200]!r}; GET /v1/models lists those there are",
                code="model_not_found", param="model",
            ) from None  # fmt: skip

    def usable(self, name: str | None) -> Served:
        """`find`, and Fault 503 where it is not ready to take requests."""
        served = self.find(name)
        if served.state in ("new", "loading"):
            raise Fault(503, f"model {served.name!r} is loading; try again soon", code="model_not_ready",
                        headers={"Retry-After": "1"})  # fmt: skip
        if served.state in ("dead", "closed"):
            raise Fault(503, f"model {served.name!r} is not running", code="engine_dead")
        return served

    async def close(self) -> None:
        await asyncio.gather(*(served.engine.close() for served in self.served.values()), return_exceptions=True)
