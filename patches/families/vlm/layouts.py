"""THE table of vision-language layouts: where each architecture keeps its decoder, norm, head and image tokens.

One row per transformers class. Everything else in the family (worker, lens, erasure) reads this table and names no
architecture. Image tokens are found by mask, `input_ids == image_token`, never by position; text and vision configs
are separate (`config.get_text_config()`).

| architecture | decoder layers | final norm | head | what an image token is |
|---|---|---|---|---|
| LLaVA, LLaVA-NeXT, lab:vlm | model.language_model.layers | model.language_model.norm | lm_head | a patch (a tile) |
| Idefics3, SmolVLM | model.text_model.layers | model.text_model.norm | lm_head | scale^2 patches |
| Qwen2-VL, Qwen2.5-VL | model.language_model.layers | model.language_model.norm | lm_head | 2 x 2 patches, M-RoPE |
| InstructBLIP | language_model.model.layers | language_model.model.norm | language_model.lm_head | a Q-Former's query |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from registry.errors import NotFound, PatchError

Pixels = Mapping[str, Tensor]
"""what a processor gives besides text: pixel_values and its companions"""
Grid = tuple[int, int] | None
"""rows and columns of one picture's image tokens; None: they have no place in the picture"""


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps what."""

    root: str
    """module the worker calls with embeddings; its keyword inputs are what edits read"""
    decoder: str
    """the language model without its head; `layers.{i}` and `norm` lie in it"""
    head: str
    features: Callable[[Any, Pixels], Tensor]
    """(model, pixels of one row) -> (image tokens, D), in the order of the row's image tokens"""
    grids: Callable[[Any, Pixels], list[Grid]]
    """(model, pixels) -> per picture, how its image tokens lie"""
    positions: Callable[[Any, Tensor, Pixels], tuple[Tensor, int]] | None = None
    """(model, ids (1, T), pixels) -> M-RoPE positions (3, T), and what is added to later columns; None: columns"""
    keys: tuple[str, ...] = ("pixel_values",)
    """the processor's outputs that belong to the pictures"""

    def block(self, layer: int) -> str:
        """Module path of a decoder layer."""
        return f"{self.decoder}.layers.{layer}"

    @property
    def norm(self) -> str:
        return f"{self.decoder}.norm"


# ---- features ----------------------------------------------------------------------------------------------------


def _pooled(out: Any) -> Tensor:
    """transformers 5 hands features out as `pooler_output`, a tensor or one per picture."""
    tokens = getattr(out, "pooler_output", out)
    parts = list(tokens) if not isinstance(tokens, Tensor) or tokens.ndim == 3 else [tokens]
    return torch.cat(parts)


def _plain(model: Any, pixels: Pixels) -> Tensor:
    return _pooled(model.model.get_image_features(**pixels, **_llava_choice(model)))


def _llava_choice(model: Any) -> dict[str, Any]:
    c = model.config
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    return {n: getattr(c, n) for n in names if getattr(c, n, None) is not None}


def _idefics(model: Any, pixels: Pixels) -> Tensor:
    return _pooled(model.model.get_image_features(**pixels))


def _qformer(model: Any, pixels: Pixels) -> Tensor:
    out = model.get_image_features(**pixels)
    tokens: Tensor = getattr(out, "pooler_output", out)
    if tokens.shape[-1] != model.config.text_config.hidden_size:  # older releases stop before the projection
        tokens = model.language_projection(tokens)
    return tokens.flatten(0, 1)


# ---- grids -------------------------------------------------------------------------------------------------------


def _square(model: Any, pixels: Pixels) -> list[Grid]:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return [(side, side)] * len(pixels["pixel_values"])


def _lab(model: Any, pixels: Pixels) -> list[Grid]:
    side = model.model.vision_tower.side
    return [(side, side)] * len(pixels["pixel_values"])


def _next(model: Any, pixels: Pixels) -> list[Grid]:
    """LLaVA-NeXT's tokens are the whole picture, then its tiles with line breaks: the whole picture's come first."""
    return _square(model, pixels)


def _idefics_grids(model: Any, pixels: Pixels) -> list[Grid]:
    """One grid per tile the processor made; the last one of a split picture is the whole of it."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size // model.config.scale_factor
    return [(side, side)] * pixels["pixel_values"].shape[1]


def _qwen_grids(model: Any, pixels: Pixels) -> list[Grid]:
    merge = model.config.vision_config.spatial_merge_size
    return [(int(h) // merge, int(w) // merge) for _, h, w in pixels["image_grid_thw"].tolist()]


def _nowhere(model: Any, pixels: Pixels) -> list[Grid]:
    return [None] * len(pixels["pixel_values"])


def _qwen_positions(model: Any, ids: Tensor, pixels: Pixels) -> tuple[Tensor, int]:
    kinds = (ids == model.config.image_token_id).int()
    where, delta = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=pixels["image_grid_thw"])
    return where[-3:, 0], int(delta.reshape(-1)[0])


def _llava(grids: Callable[[Any, Pixels], list[Grid]], *more: str) -> Layout:
    """LLaVA's layout; more: companions of pixel_values."""
    return Layout("model", "model.language_model", "lm_head", _plain, grids, keys=("pixel_values", *more))


_IDEFICS = Layout(
    "model", "model.text_model", "lm_head", _idefics, _idefics_grids, keys=("pixel_values", "pixel_attention_mask")
)
_QWEN = Layout(
    "model",
    "model.language_model",
    "lm_head",
    _idefics,
    _qwen_grids,
    positions=_qwen_positions,
    keys=("pixel_values", "image_grid_thw"),
)
LAYOUTS: dict[str, Layout] = {
    "LabVLM": _llava(_lab),
    "LlavaForConditionalGeneration": _llava(_square),
    "LlavaNextForConditionalGeneration": _llava(_next, "image_sizes"),
    "Idefics3ForConditionalGeneration": _IDEFICS,
    "SmolVLMForConditionalGeneration": _IDEFICS,
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "InstructBlipForConditionalGeneration": Layout(
        "language_model.model",
        "language_model.model",
        "language_model.lm_head",
        _qformer,
        _nowhere,
        keys=("pixel_values", "qformer_input_ids", "qformer_attention_mask"),
    ),
}
"""transformers' class name -> its layout"""


def layout(model: nn.Module | str) -> Layout:
    """The layout of a model or of a class name. Raises NotFound naming what is supported."""
    name = model if isinstance(model, str) else type(model).__name__
    if name not in LAYOUTS:
        raise NotFound(f"{name[:80]} is no vision-language model known here. Supported: {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def image_token(model: Any) -> int:
    """The id that stands for a picture's tokens in a prompt."""
    config = model.config
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise NotFound(f"{type(model).__name__}'s config names no image token, so where pictures stand is unknown.")


def image_tokens(inputs: Any, token: int) -> Tensor:
    """(B, T) bool: which tokens of this call are image tokens. Raises PatchError if the call shows no ids.

    The worker calls the model with embeddings, and its cache knows the ids; any other call brings `input_ids`.
    """
    cache = inputs.get("past_key_values")
    if hasattr(cache, "starts"):
        T = (inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]).shape[1]
        held = cache.tokens()
        at = (cache.starts[:, None] + torch.arange(T, device=held.device)).clamp_max(held.shape[1] - 1)
        return held.gather(1, at) == token
    ids = inputs.get("input_ids")
    if ids is None:
        raise PatchError(
            "The model was called with embeddings alone, so which tokens are image tokens is unknown; call it with "
            "input_ids, or decode with the family's worker."
        )
    out: Tensor = ids == token
    return out
