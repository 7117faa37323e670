"""An engine for a model, in this process or in those of a plan."""

from __future__ import annotations

from .assemble import Model, build_engine
from .config import Resolved, Settings
from .engine import Engine
from .grammar.compiled import Grammars


def build(model: Model, settings: Settings, grammars: Grammars | None = None) -> tuple[Engine, Resolved]:
    """Load the weights and put the engine together, as the settings say. `grammars`: the ones that are compiled at its
    door."""
    if settings.plan is None:
        return build_engine(model, settings, grammars)
    from .assemble_split import build_split_engine  # which most engines do without

    return build_split_engine(model, settings)
