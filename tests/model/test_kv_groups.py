"""A model with local and global layers in the engine: pools of different sizes, and pages that leave the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.assemble import Model, build_engine, open_model
from headrace.config import Settings
from headrace.engine import Engine
from headrace.kernels import native
from headrace.types import Request, SamplingParams

from .family_models import save_family

PROMPTS = [np.random.default_rng(seed).integers(0, 97, length).tolist() for seed, length in enumerate((150, 9, 70))]
NEW = 60


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gemma3")
    save_family("gemma3", folder, [1, 2, 3])
    return open_model(str(Path(folder)))


def answers(engine: Engine) -> list[list[int]]:
    """Greedy tokens of PROMPTS, all at once; the pools are checked after every step."""
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS):
        engine.add(Request(id=str(index), prompt_ids=tuple(prompt), params=params, seed=0))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    while engine.busy:
        for event in engine.step():
            tokens[event.request_id].extend(event.tokens)
        engine.scheduler.check()
    return list(tokens.values())


KERNELS = ["reference"] + ["native"] * (native.missing() is None)


@pytest.mark.parametrize("kernels", KERNELS)
def test_windowed_layers_keep_their_window(gemma3: Model, kernels: str) -> None:
    """One sequence of the context alone would fill the windowed pool several times over."""
    common = {"kernels": kernels, "threads": 1, "page_size": 16, "max_batch_tokens": 32, "kv_dtype": "float32"}
    few, resolved = build_engine(gemma3, Settings(**common, max_sequences=3))
    windowed, whole = resolved.pages
    assert windowed == 3 * 2 + 2 * 32 // 16 + 1 and whole == 3 * 256 // 16 + 1
    layers = [len(group.layers) for group in gemma3.spec.kv_groups]
    stored = 22 if kernels == "reference" else 32
    assert resolved.kv_memory == 2 * 4 * 3 * stored * 16 * (layers[0] * windowed + layers[1] * whole)
    ours = answers(few)
    assert [len(tokens) for tokens in ours] == [NEW] * 3
    pools = few.scheduler.routes.pools
    assert [pool.available for pool in pools] == [windowed - 1, whole - 1], "every page came back"
    few.close()
    alone = []
    for prompt in PROMPTS:
        engine, _ = build_engine(gemma3, Settings(**common, max_sequences=1, prefix_cache=False))
        params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
        engine.add(Request(id="0", prompt_ids=tuple(prompt), params=params, seed=0))
        tokens: list[int] = []
        while engine.busy:
            for event in engine.step():
                tokens.extend(event.tokens)
        alone.append(tokens)
        engine.close()
    assert ours == alone


def test_the_trace_tells_the_load_of_each_expert(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_family("olmoe", tmp_path, [1, 2, 3])
    model = open_model(str(tmp_path))
    loads = []
    for kernels in KERNELS:
        engine, _ = build_engine(model, Settings(kernels=kernels, threads=1, kv_dtype="float32"))
        answers(engine)
        steps = list(engine.trace)
        engine.close()
        assert all(sum(step.expert_load) == 5 * 3 * step.rows for step in steps), "three of seven a layer and row"
        loads.append([step.expert_load for step in steps])
    assert all(load == loads[0] for load in loads)


@pytest.mark.skipif(native.missing() is not None, reason="the native kernels are not built")
def test_the_pools_are_as_large_as_was_said(gemma3: Model) -> None:
    from headrace.assemble import pool_shapes
    from headrace.kernels.native import NativeOps

    ops = NativeOps(1)
    spec = gemma3.spec
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        for group, shape in zip(spec.kv_groups, pool_shapes(spec, ops, dtype, 32)):
            cache = ops.kv_cache(len(group.layers), 5, 32, spec.kv_heads, spec.head_dim, dtype)[0]
            assert cache.pool.nbytes == 5 * shape.page_bytes
