"""Decoder-only language models in Llama's layout, from transformers folders, wheels and GGUF files."""

from patches.families.family import Family
from patches.families.llm.base import SITES, knows, load, site, spread
from patches.families.llm.fold import fold
from patches.families.llm.planted import TINIES, planted, tiny, weights_digest
from patches.families.llm.table import TABLE, WHEELS
from patches.families.llm.text import encode, generate, maker, predict
from patches.families.llm.tokens import first_token, query_columns, real_tokens, repeated_token, runs
from patches.families.llm.worker import Decoder

__all__ = [
    "FAMILY", "SITES", "TINIES", "encode", "first_token", "generate", "load", "maker", "planted", "query_columns",
    "real_tokens", "repeated_token", "runs", "site", "tiny", "weights_digest",
]  # fmt: skip

FAMILY = Family(
    name="llm",
    load=load,
    tiny=tiny,
    worker=Decoder.of,
    table=TABLE,
    predict=predict,
    example="pypi:smollm2",
    prompt=maker,
    purposes=TINIES,
    sites=SITES,
    fold=fold,
    wheels=WHEELS,
    knows=knows,
    spread=spread,
)
