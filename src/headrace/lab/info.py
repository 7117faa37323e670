"""What `headrace info` tells: the machine, the op set and why, and what a model costs here, by its header alone."""

from __future__ import annotations

from math import prod
from operator import mul
from typing import Any

import msgspec

from ..assemble import EncoderModel, Model, available_memory, open_any, pool_shapes, resolve_settings
from ..config import Settings
from ..kernels import choose_ops, native
from ..model.weights import step_bytes
from ..results import machine_facts
from ..schedule.pages import most_pages

CONTEXTS = (512, 2048, 8192, 32768, 131072)
GIB = 2**30


def describe(name: str | None = None, kernels: str = "auto") -> dict[str, Any]:
    """Facts as plain data: "machine", "kernels", and "model" where a name is given. Raises what opening it raises."""
    machine = machine_facts() | {"memory_available_bytes": available_memory()}
    ops = choose_ops(kernels, machine["cores"])
    facts = {"machine": machine, "kernels": {"name": ops.name, "threads": ops.threads, "why": _why(kernels, ops.name)}}
    if name is not None:
        model = open_any(name)
        if isinstance(model, EncoderModel):
            facts["model"] = _describe_encoder(model)
        else:
            facts["model"] = _describe_model(model, kernels, ops, machine["memory_available_bytes"])
    return facts


def _describe_encoder(model: EncoderModel) -> dict[str, Any]:
    """An encoder keeps no keys and values, so its weights are what it costs."""
    spec = model.spec
    of_layers = spec.layers * sum(map(prod, spec.layer_shapes.values()))
    parameters = of_layers + sum(map(prod, spec.table_shapes.values()))
    return _describe_file(model, parameters)


def _describe_file(model: Model | EncoderModel, parameters: int) -> dict[str, Any]:
    types: dict[str, int] = {}
    for tensor in model.file.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + tensor.nbytes
    return {
        "name": model.name,
        "path": str(model.path),
        "kind": "encoder" if isinstance(model, EncoderModel) else "decoder",
        "spec": msgspec.to_builtins(model.spec, enc_hook=str),
        "parameters": parameters,
        "weight_bytes": sum(types.values()),
        "weight_bytes_by_type": types,
        "quantised": getattr(model.file, "quantised", None),
    }


def _describe_model(model: Model, kernels: str, ops: Any, available: int) -> dict[str, Any]:
    spec = model.spec
    facts = _describe_file(model, spec.parameters)
    weights = facts["weight_bytes"]
    resolved = resolve_settings(model, Settings(kernels=kernels), ops)
    contexts = sorted({*(c for c in CONTEXTS if c < spec.context_length), spec.context_length})
    shapes = pool_shapes(spec, ops, resolved.kv_dtype, resolved.page_size)
    page_bytes = [shape.page_bytes for shape in shapes]

    def of_pools(context: int) -> list[int]:
        """Pages that a sequence of `context` tokens holds in each pool while it is decoded."""
        whole = -(-context // resolved.page_size)
        steps = resolved.steps_in_flight
        windows = (shape.window for shape in shapes)
        return [whole if w is None else min(whole, most_pages(resolved.page_size, w, steps)) for w in windows]

    return {
        **facts,
        "bytes_per_step": step_bytes(model.file, spec),
        "kv_bytes_per_token": resolved.kv_bytes_per_token,
        "settings": msgspec.to_builtins(resolved),
        "fits": [
            {
                "context": context,
                "sequences": min((pages - 1) // held for pages, held in zip(resolved.pages, of_pools(context))),
                "sequences_in_free_memory": max(0, available - weights) // sum(map(mul, of_pools(context), page_bytes)),
            }
            for context in contexts
        ],
    }


def _why(kernels: str, name: str) -> str:
    if kernels != "auto":
        return "asked for"
    return "the fastest here" if name != "reference" else f"no compiled kernels: {native.missing()}"


def print_facts(facts: dict[str, Any]) -> None:
    """`describe`'s facts as tables."""
    from rich.console import Console

    console = Console(highlight=False)
    machine, kernels = facts["machine"], facts["kernels"]
    memory = f"{(machine['memory_bytes'] or 0) / GIB:.1f} GiB, {machine['memory_available_bytes'] / GIB:.1f} GiB free"
    console.print(
        _table(
            "Machine",
            {
                "cpu": f"{machine['cpu']}, {machine['cores']} cores",
                "instruction sets": " ".join(machine["isa"]) or "unknown",
                "memory": memory,
                "python, numpy": f"{machine['python']}, {machine['numpy']}",
                "headrace": " ".join(str(machine[name]) for name in ("headrace", "commit") if machine[name]),
                "op set": f"{kernels['name']} ({kernels['why']}), {kernels['threads']} threads",
            },
        )
    )
    if "model" in facts:
        show = _print_encoder if facts["model"]["kind"] == "encoder" else _print_model
        show(console, facts["model"])


def _print_encoder(console: Any, model: dict[str, Any]) -> None:
    spec = model["spec"]
    head = spec["head"]
    rows = {
        "file": model["path"],
        "architecture": f"{spec['architecture']}, an encoder, {model['parameters'] / 1e6:,.1f} M parameters",
        "layers, width": f"{spec['layers']}, {spec['dim']} (feed-forward {spec['ffn_dim']})",
        "heads": f"{spec['heads']} of {spec['dim'] // spec['heads']}",
        "vocabulary": f"{spec['vocab_size']:,}",
        "a text": f"at most {spec['context_length']:,} tokens, of {spec['positions']:,} positions",
        "an embedding": f"{spec['dim']} numbers, pooled by {spec['pooling']}",
        "head": "none" if head is None else f"{head['task']}, {len(head['labels'])} labels",
        "weights": _weights(model),
        **({"checkpoint": model["quantised"]} if model["quantised"] else {}),
    }
    console.print(_table(spec["name"], rows))


def _weights(model: dict[str, Any]) -> str:
    types = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in model["weight_bytes_by_type"].items())
    return f"{model['weight_bytes'] / 1e6:,.1f} MB ({types})"


def _print_model(console: Any, model: dict[str, Any]) -> None:
    from rich.table import Table

    spec, settings = model["spec"], model["settings"]
    windows = sorted({window for window in spec["windows"] if window is not None})
    rows = {
        "file": model["path"],
        "architecture": f"{spec['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters",
        "layers, width": f"{spec['layers']}, {spec['dim']} (feed-forward {spec['ffn_dim']})",
        "heads": f"{spec['heads']} of {spec['head_dim']}, {spec['kv_heads']} for keys and values",
        "vocabulary": f"{spec['vocab_size']:,}, head {'tied to the embedding' if spec['tied'] else 'of its own'}",
        "context": f"{spec['context_length']:,} tokens" + (f", windows of {windows}" if windows else ""),
        "weights": _weights(model),
        **({"checkpoint": model["quantised"]} if model["quantised"] else {}),
        "read by a step": f"{model['bytes_per_step'] / 1e6:,.1f} MB of weights",
        "keys and values": f"{model['kv_bytes_per_token']:,} bytes a token as {settings['kv_dtype']}",
        "set aside for them": f"{settings['kv_memory'] / GIB:.2f} GiB, context up to {settings['max_context']:,}",
    }
    console.print(_table(spec["name"], rows))
    fits = Table(title="Sequences that fit", title_justify="left")
    for name in ("context", "in the memory set aside", "in all free memory"):
        fits.add_column(name, justify="right")
    for row in model["fits"]:
        fits.add_row(*(f"{row[name]:,}" for name in ("context", "sequences", "sequences_in_free_memory")))
    console.print(fits)


def _table(title: str, rows: dict[str, str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
