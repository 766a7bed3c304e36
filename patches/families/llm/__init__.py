"""Decoder-only language models in Llama's layout, from transformers folders, wheels and GGUF files."""

from patches.families.llm.base import SITES, load, site
from patches.families.llm.planted import TINIES, planted, tiny, weights_digest
from patches.families.llm.tokens import first_token, query_columns, real_tokens, repeated_token, runs

__all__ = [
    "SITES", "TINIES", "first_token", "load", "planted", "query_columns", "real_tokens", "repeated_token", "runs",
    "site", "tiny", "weights_digest",
]  # fmt: skip
