"""Layout of a CLIP: module paths by canonical site name, and the files of a checkpoint folder."""

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
"""Canonical site name -> module path in the image tower. Outputs: embed (B, T, D), the residual stream before block 0;
block, the stream after block i ("resid_post"); mlp, the MLP's output ("mlp_out"); attn, the attention's output; values
(B, H, T, e); pattern (B, H, T, T), computed only while it is hooked. Inputs: heads (B, T, D), concatenated head
outputs; neurons (B, T, 4D), after the activation; ln_post, the last stream"""
TEXT_SITES = {k: v.removeprefix("visual.") for k, v in SITES.items()} | {
    "embed": "token_embedding",
    "ln_post": "ln_final",
}
"""The same names in the text tower; `embed` is there before position embeddings are added"""


def site(name: str, layer: int = 0, tower: str = "image") -> str:
    """Return the module path of a canonical site; tower is "image" or "text"."""
    return (SITES if tower == "image" else TEXT_SITES)[name].format(i=layer)


__all__ = ["CONFIG", "GOLDEN", "SHIPPED", "SITES", "TEXT_SITES", "WEIGHTS", "site"]
