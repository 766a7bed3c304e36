"""Which token of a row is the first and which ids the cache holds: shared by all mechanisms of language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patches.engine.edits import Inputs
from registry.errors import PatchError

# ---- the first token of each row, and the token ids in the cache ------------------------------------------------


def first_token(inputs: Mapping[str, Any]) -> Tensor:
    """Mark the first real token of each row: (B, T) bool, all false if it is not in this call.

    Raises PatchError for a mask that hides where rows start.
    """
    x = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    B, T = x.shape[:2]
    cache: Any = inputs.get("past_key_values")
    here = torch.arange(T, device=x.device)
    if hasattr(cache, "starts"):
        return (cache.starts[:, None] + here) == 0
    past = inputs["past_length"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return ((here + past) == 0).expand(B, T)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise PatchError("The attention mask is not 2-D, so the first token of each row is unknown; pass a 2-D mask.")
    return (here[None] + past) == mask.long().argmax(1, keepdim=True).to(x.device)


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Return the token id of every key position (B, K) long, cached ones included; -1 for padding and empty columns.

    Ids of earlier calls are kept in the cache as one more layer, so that beams, crops and repeats move them like keys.
    Raises PatchError if the cache was begun without the patch, or if the model got embeddings in place of ids.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise PatchError("This patch needs input_ids, but the model was called with embeddings.")
    cache: Any = inputs.get("past_key_values")
    if hasattr(cache, "starts"):
        return cache.tokens()
    mask = inputs.get("attention_mask")
    if cache is not None:
        ids = _remember(cache, ids, inputs["past_length"])
    if mask is None:
        return ids
    if mask.ndim != 2:
        raise PatchError("The attention mask is not 2-D, so padding is unknown; pass a 2-D mask.")
    return ids.masked_fill(~mask[:, : ids.shape[1]].bool(), -1)


def query_columns(inputs: Mapping[str, Any]) -> Tensor:
    """Return the key column (B, T) long of each token of this call."""
    ids = inputs["input_ids"]
    here = torch.arange(ids.shape[1], device=ids.device)
    cache: Any = inputs.get("past_key_values")
    if hasattr(cache, "starts"):
        return cache.starts[:, None] + here
    return (here + inputs["past_length"]).expand(ids.shape[0], -1)


def repeated_token(inputs: Inputs) -> Tensor:
    """Mark tokens that equal their predecessor in the row: (B, T) bool."""
    ids, at = inputs.once(real_tokens), inputs.once(query_columns)
    before = ids.gather(1, (at - 1).clamp_min(0))
    return (ids.gather(1, at) == before) & (at > 0) & (before >= 0)


def runs(inputs: Inputs) -> Tensor:
    """Number the unbroken runs of equal tokens: (B, K) long, the run of each key; -1 where there is no token."""
    ids = inputs.once(real_tokens)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return (new.cumsum(1) - 1).masked_fill(ids < 0, -1)


def _remember(cache: Any, ids: Tensor, past: int) -> Tensor:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(cache, DynamicCache):
        raise PatchError(f"{type(cache).__name__} cannot carry token ids; use a DynamicCache.")
    mine: Any = next((layer for layer in cache.layers if isinstance(layer, _Ids)), None)
    if mine is None:
        if past:
            raise PatchError("The cache was begun without this patch, so its token ids are unknown; prefill it again.")
        if not cache.layers:  # a cache without a config creates layers on demand; the layer of ids must come after them
            raise PatchError("Make the cache with DynamicCache(config=model.config), so that it knows its layers.")
        mine = _ids_class(DynamicLayer)()
        cache.layers.append(mine)
    keys, _ = mine.update(ids[:, None, :, None], ids[:, None, :, None])
    return keys[:, 0, :, 0]


class _Ids:
    """Marker of the cache layer that holds token ids."""


def _ids_class(layer: type[Any]) -> type[Any]:
    return type("IdsLayer", (_Ids, layer), {})
