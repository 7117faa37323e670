"""Opening a model file as a user does, in a child process that is watched: what came of it, how long it took, and how
much memory. Small whole models to damage."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SLACK_BYTES = 24 << 20  # what the libraries take that are loaded on the way
CHILD_BYTES = 6 << 30  # of address space: a backstop
KINDS = {bool: 7, float: 6, str: 8, list: 9}


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]]
) -> Path:
    """A GGUF file of any metadata and tensors {name: (shape, type, bytes)}, right or wrong."""
    entries, data = [], b""
    for name, (shape, type, content) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        entries.append(_text(name) + dims + struct.pack("<IQ", type, len(data)))
        data += content + bytes(-len(content) % 32)
    keys = [_text(key) + struct.pack("<I", _kind(value)) + _value(value) for key, value in metadata.items()]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(keys) + b"".join(entries)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _kind(value: Any) -> int:
    if type(value) is int:
        return 11 if value < 0 else 4 if value < 2**32 else 10
    return KINDS[type(value)]


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0]) if value else 4
        return struct.pack("<IQ", kind, len(value)) + b"".join(map(_value, value))
    if isinstance(value, str):
        return _text(value)
    return struct.pack({7: "<?", 6: "<f", 11: "<q", 4: "<I", 10: "<Q"}[_kind(value)], value)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """What `write_gguf` takes, of a file that is right."""
    from gguf.constants import GGMLQuantizationType

    from headrace.formats.gguf import open_gguf

    file = open_gguf(path)
    types = {member.name: int(member) for member in GGMLQuantizationType}
    tensors = {n: (t.shape, types[t.type.name], t.data.tobytes()) for n, t in file.tensors.items()}
    return dict(file.metadata), tensors


def write_folder(folder: Path, quantised: bool = False) -> Path:
    """A tiny Hugging Face model with its tokenizer; its linears in GPTQ's layout if `quantised`."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(alphabet),
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    tensors: dict[str, np.ndarray] = {"model.embed_tokens.weight": rng.standard_normal((256, 64)).astype(np.float32)}
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    for layer in range(2):
        place = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}{name}.weight"] = np.ones(64, np.float32)
        for name, rows, cols in (
            ("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 32, 64), ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64), ("mlp.gate_proj", 96, 64), ("mlp.up_proj", 96, 64), ("mlp.down_proj", 64, 96),
        ):  # fmt: skip
            if quantised:
                words = rng.integers(0, 2**32, (cols // 8, rows), dtype=np.uint32).view(np.int32)
                zeros = rng.integers(0, 2**32, (cols // 32, rows // 8), dtype=np.uint32).view(np.int32)
                parts = {"qweight": words, "qzeros": zeros, "g_idx": (np.arange(cols) // 32).astype(np.int32)}
                parts["scales"] = rng.uniform(0.01, 0.02, (cols // 32, rows)).astype(np.float16)
                tensors |= {f"{place}{name}.{part}": value for part, value in parts.items()}
            else:
                tensors[f"{place}{name}.weight"] = rng.standard_normal((rows, cols)).astype(np.float16)
    if quantised:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    return folder


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


class Examiner:
    """A child process that opens models, one after another. Used as a context."""

    def __enter__(self) -> Examiner:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._ask({}) is not None, "the child does not start"

    def _ask(self, question: dict[str, Any], seconds: float = 60) -> dict[str, Any] | None:
        """The child's answer; None where it died or took too long."""
        import select

        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def examine(self, path: Path, seconds: float = 20) -> dict[str, Any]:
        """{"outcome": "loads", an error's type, "crash" or "hang", "message", "seconds", "bytes"}."""
        start = time.monotonic()
        answer = self._ask({"path": str(path)}, seconds)
        if answer is None:
            died = self._process.poll() is not None or time.monotonic() - start < seconds
            self._process.kill()
            status = self._process.wait()
            self._start()
            answer = {"outcome": "crash" if died else "hang", "message": f"status {status}", "bytes": 0}
        return answer | {"seconds": time.monotonic() - start}


def complaint(answer: dict[str, Any], size: int, seconds: float = 10) -> str | None:
    """What is wrong with how a file of `size` bytes was met, if something is."""
    from headrace import errors

    typed = answer["outcome"] == "loads" or hasattr(errors, answer["outcome"])
    if not typed:
        return f"{answer['outcome']}: {answer['message']}"
    if answer["seconds"] > seconds:
        return f"took {answer['seconds']:.1f} s"
    if answer["bytes"] > 2 * size + SLACK_BYTES:
        return f"took {answer['bytes']} bytes for a file of {size}"
    return None


# The child


def _peak() -> int:
    """Bytes of memory at most since the last call."""
    status = Path("/proc/self/status").read_text()
    high, now = (int(status.split(f"{name}:")[1].split()[0]) << 10 for name in ("VmHWM", "VmRSS"))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return max(high, now)


def _open(path: str) -> tuple[str, str]:
    from headrace.assemble import open_model
    from headrace.errors import HeadraceError
    from headrace.kernels.reference import ReferenceOps
    from headrace.model.weights import load_weights
    from headrace.text.chat import render_chat

    try:
        model = open_model(path)
        tokenizer = model.tokenizer()
        tokenizer.decode(tokenizer.encode("Hello, wörld 12!"))
        if tokenizer.chat_template is not None:
            render_chat(tokenizer.chat_template, [{"role": "user", "content": "Hi"}])
        load_weights(model.file, model.spec, ReferenceOps(1), range(model.spec.layers))
    except HeadraceError as error:
        return type(error).__name__, str(error)[:1000]
    except Exception as error:
        return f"untyped {type(error).__name__}", str(error)[:1000]
    return "loads", ""


def _serve(lines: Iterator[str]) -> None:
    warnings.simplefilter("ignore")
    for line in lines:
        path = json.loads(line).get("path")
        if path is None:
            answer = {}
        else:
            _peak()
            before = _peak()
            outcome, message = _open(path)
            answer = {"outcome": outcome, "message": message, "bytes": _peak() - before}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    _serve(sys.stdin)
