"""From a model's name and a user's settings to a running engine: every "auto" is resolved here, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from .config import Resolved, SchedulerConfig, Settings
from .engine import Engine
from .errors import CapacityError, ConfigError, ModelFileError, UnsupportedModelError
from .formats.gguf import GGUFFile, open_gguf
from .formats.hub import resolve
from .formats.safetensors import Checkpoint, open_checkpoint
from .grammar.compiled import Grammars
from .kernels import choose_ops
from .kernels.native import Limits, NativeOps
from .kernels.reference import ReferenceOps
from .memory.kv import PoolShape, kv_format, split_pages
from .model.decoder import Decoder
from .model.encoder import Encoder
from .model.encoder_spec import EncoderSpec
from .model.encoder_weights import load_encoder_weights
from .model.families import read_spec
from .model.families.encoders import is_encoder, read_encoder
from .model.spec import ModelSpec
from .model.weights import load_weights
from .quant.read import read_quantised
from .schedule.pages import UNBOUNDED, Pages, Path
from .schedule.routes import Routes
from .schedule.scheduler import Scheduler
from .text.tokenizer import Tokenizer
from .workers.embedder import Embedder
from .workers.executor import Executor, ThreadExecutor
from .workers.residents import Residents
from .workers.runner import NativeRunner, Runner

GiB = 2**30
AUTO_KV_MEMORY = 2 * GiB
AUTO_KV_SHARE = 0.25  # of the memory that is free
LOGIT_ROWS = 128

Pools = Callable[[str], list[PoolShape]]


@dataclass(frozen=True)
class Model:
    """A model on disk, opened but not loaded."""

    name: str
    path: FilePath
    file: GGUFFile | Checkpoint
    spec: ModelSpec

    def tokenizer(self) -> Tokenizer:
        return tokenizer_maker(self)()


@dataclass(frozen=True)
class EncoderModel:
    """An encoder on disk, opened but not loaded."""

    name: str
    path: FilePath
    file: GGUFFile | Checkpoint
    spec: EncoderSpec

    def tokenizer(self) -> Tokenizer:
        return tokenizer_maker(self)()


def tokenizer_maker(model: Model | EncoderModel) -> Callable[[], Tokenizer]:
    """Makes the model's tokenizer when it is called. What waits for that keeps no weights mapped, as the model does."""
    if isinstance(model.file, GGUFFile):
        return partial(_gguf_tokenizer, model.file.metadata, model.path, model.spec.vocab_size)
    return partial(Tokenizer.from_folder, model.path)


def _gguf_tokenizer(metadata: dict[str, Any], path: FilePath, rows: int) -> Tokenizer:
    tokenizer = Tokenizer.from_gguf(metadata, path=path)
    if tokenizer.vocab_size != rows:
        problem = f"has {tokenizer.vocab_size} tokens for {rows} rows of the embedding"
        raise ModelFileError(path, "tokenizer.ggml.tokens", problem)
    return tokenizer


def open_any(name: str) -> Model | EncoderModel:
    """Find a model (pulling it where needed), map its file and read its spec. Raises the errors of `formats` and
    `model.spec`."""
    path = resolve(name)
    file = read_quantised(open_checkpoint(path)) if path.is_dir() else open_gguf(path)
    if is_encoder(file):
        return EncoderModel(name, path, file, read_encoder(file))
    return Model(name, path, file, read_spec(file))


def open_model(name: str) -> Model:
    """The same for what must generate text; UnsupportedModelError for an encoder."""
    model = open_any(name)
    if isinstance(model, EncoderModel):
        raise UnsupportedModelError(
            f"{name} is an encoder ({model.spec.architecture}): it generates nothing; embed texts with it "
            "(headrace embed, LLM.embed)"
        )
    return model


def build_embedder(model: EncoderModel, settings: Settings) -> Embedder:
    """Load an encoder's weights. Of the settings those count that are not about keys and values."""
    ops = choose_ops(settings.kernels, thread_count(settings.threads), settings.activations)
    encoder = Encoder(model.spec, load_encoder_weights(model.file, model.spec, ops))
    return Embedder(encoder, ops, settings.max_batch_tokens, settings.max_sequences)


def build_engine(model: Model, settings: Settings, grammars: Grammars | None = None) -> tuple[Engine, Resolved]:
    """Load the weights and put an engine of this process together. `grammars`: the ones that are compiled at its
    door."""
    ops = choose_ops(settings.kernels, thread_count(settings.threads), settings.activations)
    resolved = resolve_settings(model, settings, ops)
    spec = model.spec
    layers = range(spec.layers)
    decoder = Decoder(spec, load_weights(model.file, spec, ops, layers), layers, resolved.max_context)
    caches = [
        ops.kv_cache(len(group.layers), pages, resolved.page_size, spec.kv_heads, spec.head_dim, resolved.kv_dtype)
        for group, pages in zip(spec.kv_groups, resolved.pages, strict=True)
    ]
    residents = Residents(
        resolved.max_sequences,
        resolved.max_context,
        resolved.page_size,
        len(caches),
        grammars or Grammars(tokenizer_maker(model), spec.vocab_size),
    )
    ahead = resolved.steps_in_flight * resolved.max_batch_tokens
    pools = zip(spec.kv_groups, resolved.pages, strict=True)
    paged = [Pages(pages, resolved.page_size, group.window, ahead) for group, pages in pools]
    routes = Routes.alone(Path(paged, depth=resolved.steps_in_flight))
    scheduler = Scheduler(scheduler_config(resolved), routes)
    return Engine(scheduler, _executor(decoder, ops, caches, residents, resolved)), resolved


def scheduler_config(resolved: Resolved) -> SchedulerConfig:
    return SchedulerConfig(
        max_batch_tokens=resolved.max_batch_tokens,
        max_sequences=resolved.max_sequences,
        max_logit_rows=resolved.max_logit_rows,
        max_context=resolved.max_context,
        policy=resolved.policy,
        prefix_cache=resolved.prefix_cache,
    )


def _executor(
    decoder: Decoder, ops: NativeOps | ReferenceOps, caches: list[list[Any]], residents: Residents, resolved: Resolved
) -> Executor:
    if isinstance(ops, ReferenceOps):
        return ThreadExecutor(Runner(decoder, ops, caches, residents).run, residents.clear)
    pages = -(-resolved.max_context // resolved.page_size)
    limits = Limits(
        rows=resolved.max_batch_tokens,
        logits=resolved.max_logit_rows,
        chunks=resolved.max_sequences,
        sequences=resolved.max_sequences,
        pages=(pages,) * len(caches),
    )
    program = ops.capture(lambda batch: decoder.forward(ops, batch, caches), limits)
    return NativeRunner(program, ops, caches, residents)


def resolve_settings(model: Model, settings: Settings, ops: Any, pools: Pools | None = None) -> Resolved:
    """Replace every "auto". CapacityError where not even one short sequence fits. `pools`: those of a model that is
    split, for a KV format; else those of its KV groups."""
    spec = model.spec
    kv_dtype = ops.default_kv_dtype if settings.kv_dtype == "auto" else settings.kv_dtype
    shapes = pools(kv_dtype) if pools else pool_shapes(spec, ops, kv_dtype, settings.page_size)
    page_bytes = sum(shape.page_bytes for shape in shapes)
    context = settings.max_context or spec.context_length
    if context > spec.context_length:
        raise ConfigError(f"max_context {context} is more than the model's context of {spec.context_length}; lower it")
    memory = settings.kv_memory
    if memory is not None and memory > (installed := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise CapacityError(f"kv_memory of {memory} bytes is more than the {installed} bytes of this machine; lower it")
    if memory is None:
        memory = min(AUTO_KV_MEMORY, int(AUTO_KV_SHARE * available_memory()))
    pages = split_pages(
        shapes,
        memory,
        settings.page_size,
        most=settings.max_sequences * -(-context // settings.page_size) if settings.kv_memory is None else UNBOUNDED,
        sequences=settings.max_sequences,
        batch_tokens=settings.max_batch_tokens,
        steps=settings.steps_in_flight,
    )
    if min(pages) < 2:
        raise CapacityError(
            f"kv_memory of {memory} bytes is less than 2 pages of {page_bytes} bytes; "
            "raise kv_memory, or lower page_size"
        )
    ahead = settings.steps_in_flight * settings.max_batch_tokens
    paged = zip(shapes, pages, strict=True)
    path = Path([Pages(count, settings.page_size, shape.window, ahead) for shape, count in paged])
    fitting = path.capacity + 1
    if context > fitting and settings.max_context is not None:
        raise CapacityError(
            f"a context of {context} tokens needs {(-(-(context - 1) // settings.page_size) + 1) * page_bytes} bytes "
            f"of KV memory, there are {memory}; raise kv_memory or lower max_context"
        )
    return Resolved(
        model=model.name,
        kernels=ops.name,
        threads=ops.threads,
        activations=settings.activations if isinstance(ops, NativeOps) else None,
        max_context=min(context, fitting),
        kv_dtype=kv_dtype,
        kv_bytes_per_token=page_bytes // settings.page_size,
        page_size=settings.page_size,
        pages=pages,
        kv_memory=sum(count * shape.page_bytes for count, shape in zip(pages, shapes, strict=True)),
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        max_logit_rows=max(LOGIT_ROWS, settings.max_sequences),
        policy=settings.policy,
        prefix_cache=settings.prefix_cache,
        steps_in_flight=settings.steps_in_flight,
    )


def pool_shapes(spec: ModelSpec, ops: Any, kv_dtype: str, page_size: int) -> list[PoolShape]:
    """The pools of a model's KV groups, as `ops` stores them."""
    head_dim = -(-spec.head_dim // ops.kv_head_multiple) * ops.kv_head_multiple
    per_layer = kv_format(kv_dtype).token_bytes(1, spec.kv_heads, head_dim) * page_size
    return [PoolShape(group.window, len(group.layers) * per_layer) for group in spec.kv_groups]


def available_memory() -> int:
    """Bytes of memory that could be used without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def thread_count(wanted: int | None) -> int:
    """The threads asked for, or one for each core that this process may use."""
    return wanted or len(os.sched_getaffinity(0))
