"""Where things are in a CLIP: module paths by canonical name, and the files of a checkpoint folder."""

from __future__ import annotations

from patches.families.base import SHIPPED

CONFIG, WEIGHTS, GOLDEN = "open_clip_config.json", "open_clip_model.safetensors", "golden.safetensors"

SITES = {
    "embed": "visual.ln_pre",
    "block": "visual.transformer.resblocks.{i}",
    "attn": "visual.transformer.resblocks.{i}.attn",
    "values": "visual.transformer.resblocks.{i}.attn.values",
    "pattern": "visual.transformer.resblocks.{i}.attn.pattern",
    "heads": "visual.transformer.resblocks.{i}.attn.out_proj",
    "mlp": "visual.transformer.resblocks.{i}.mlp",
    "neurons": "visual.transformer.resblocks.{i}.mlp.c_proj",
    "ln_post": "visual.ln_post",
}
"""canonical name -> module path in the image tower. Its output: embed (B, T, D), the residual stream before block 0;
block, the stream after block i ("resid_post"); mlp, what the MLP adds ("mlp_out"); attn, what attention adds; values
(B, H, T, e); pattern (B, H, T, T), formed only while somebody hooks it. Its input: heads (B, T, D), what the heads
give, side by side; neurons (B, T, 4D), after the activation; ln_post, the last stream"""
TEXT_SITES = {k: v.removeprefix("visual.") for k, v in SITES.items()} | {
    "embed": "token_embedding",
    "ln_post": "ln_final",
}
"""the same names in the text tower; `embed` is there before positions are added"""


def site(name: str, layer: int = 0, tower: str = "image") -> str:
    """Module path of a canonical site; tower is "image" or "text"."""
    return (SITES if tower == "image" else TEXT_SITES)[name].format(i=layer)


__all__ = ["CONFIG", "GOLDEN", "SHIPPED", "SITES", "TEXT_SITES", "WEIGHTS", "site"]
