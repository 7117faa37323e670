"""The families of encoders: for each name that a file gives its architecture, who reads its spec and where its weights
lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import UnsupportedModelError
from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..encoder_spec import EncoderSpec
from ..fields import Fields
from ..layout import Layout
from .bert import bert_gguf_layout, bert_layout, modern_names, read_bert, read_bert_gguf, read_roberta, roberta_layout
from .distilbert import distilbert_layout, read_distilbert


class EncoderFamily(NamedTuple):
    """All take the opened file or folder; the layout takes the spec as well."""

    read: Callable[[Any], EncoderSpec]
    layout: Callable[[Any, EncoderSpec], Layout]
    normal: Callable[[Any], Any] = lambda source: source  # with tensors named as the layout says


_BERT = EncoderFamily(read_bert, bert_layout, modern_names)
_ROBERTA = EncoderFamily(read_roberta, roberta_layout)
_DISTILBERT = EncoderFamily(read_distilbert, distilbert_layout)
GGUF = {"bert": EncoderFamily(read_bert_gguf, bert_gguf_layout)}
HUGGING_FACE = {
    "BertModel": _BERT,
    "BertForMaskedLM": _BERT,
    "BertForSequenceClassification": _BERT,
    "RobertaModel": _ROBERTA,
    "RobertaForMaskedLM": _ROBERTA,
    "RobertaForSequenceClassification": _ROBERTA,
    "DistilBertModel": _DISTILBERT,
    "DistilBertForMaskedLM": _DISTILBERT,
    "DistilBertForSequenceClassification": _DISTILBERT,
}


def is_encoder(source: GGUFFile | Checkpoint) -> bool:
    """Whether an opened model is an encoder that is supported."""
    return _architecture(source) in (GGUF if isinstance(source, GGUFFile) else HUGGING_FACE)


def read_encoder(source: GGUFFile | Checkpoint) -> EncoderSpec:
    """The spec of an opened encoder. Raises as `families.read_spec` does."""
    family = encoder_family(source)
    return family.read(family.normal(source))


def encoder_family(source: GGUFFile | Checkpoint) -> EncoderFamily:
    """The family of an opened encoder. Raises UnsupportedModelError for one that is not supported."""
    families, name = GGUF if isinstance(source, GGUFFile) else HUGGING_FACE, _architecture(source)
    if name not in families:
        known = ", ".join(families)
        raise UnsupportedModelError(
            f"{source.path}: architecture {name!r:.80} is no supported encoder; in this kind of file: {known}"
        )
    return families[name]


def _architecture(source: GGUFFile | Checkpoint) -> Any:
    """What the file calls its architecture, None where it does not say one name."""
    if isinstance(source, GGUFFile):
        return source.metadata.get("general.architecture")
    names = Fields(source.path, source.config).values.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
