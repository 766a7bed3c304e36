"""Refuse checkpoints that would embed wrongly: unknown layouts, wrong activations, deviating golden embeddings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.families.base import Base
from patches.families.clip.attention import _blocks
from patches.families.clip.embeddings import embed_images, embed_texts
from patches.families.clip.layout import CONFIG
from patches.families.clip.library import open_clip
from registry.errors import BadArtifact, NotFound

GOLDEN_TEXTS = ("a photo of a cat", "the word dog on a red sign", "3 blue circles, water")
GOLDEN_TOLERANCE = 1e-4
"""Largest difference of unit embeddings, float32 on a CPU"""


def _check_config(model_cfg: Any) -> None:
    """Check that a config is CLIP with a plain ViT pooled at the class token. Raises NotFound with the reason."""
    try:
        v, t = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    except (KeyError, TypeError, ValueError):
        raise NotFound("The config has no vision_cfg and text_cfg, so it is no open_clip model.") from None
    custom = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    reasons = {
        "it is CoCa, whose image tower pools by attention": "multimodal_cfg" in model_cfg,
        "its image tower is a timm model": v.get("timm_model_name"),
        "its image tower is a ResNet, which has no stream of tokens": isinstance(v.get("layers"), list | tuple),
        "its image tower pools by attention": v.get("attentional_pool"),
        "its image tower does not pool the class token": v.get("pool_type", "tok") != "tok"
        or v.get("final_ln_after_pool"),
        "it was trained with SigLIP's sigmoid loss": model_cfg.get("init_logit_bias") is not None,
        "its blocks scale what they add (LayerScale)": v.get("ls_init_value") or t.get("ls_init_value"),
        "its blocks are not CLIP's own": any(x.get(k) for x in (v, t) for k in custom)
        or "custom" in (v.get("block_type"), t.get("block_type")),
        "its text tower is another library's model": t.get("hf_model_name"),
        "its text tower has a class token": t.get("embed_cls"),
    }
    if reason := next((why for why, yes in reasons.items() if yes), None):
        raise NotFound(
            f"This checkpoint is not supported: {reason}. Supported: ViT-B/L/H/g/bigG of OpenAI, LAION, DataComp, "
            "MetaCLIP, DFN and transformers' CLIPModel."
        )


def _check_activation(ref: str, name: str, config: Mapping[str, Any], golden: bool) -> None:
    """Check the activation function by config and names, the only evidence without a golden embedding.

    Raises NotFound.
    """
    quick = config["model_cfg"].get("quick_gelu")
    hub = ref.removeprefix("hf-hub:").partition("@")[0] + "/"
    known = [
        bool(tag.get("quick_gelu"))
        for tags in open_clip("pretrained")._PRETRAINED.values()
        for tag in tags.values()
        if tag.get("hf_hub") == hub
    ]
    named = "openai" in name or "quickgelu" in name
    # a name is believed where the config is silent, and no further: folders are called what somebody likes
    trained = known[0] if known else True if named and quick is None else None
    if trained is not None and trained != bool(quick):
        raise NotFound(
            f"{ref}: these weights were trained with {'QuickGELU' if trained else 'GELU'}, but the config says "
            f'quick_gelu={bool(quick)}, which would quietly give other embeddings. Set "quick_gelu": '
            f"{str(trained).lower()} in model_cfg of {CONFIG}."
        )
    if quick is None and trained is None and not golden:
        warnings.warn(
            f"{ref} has no golden embedding and its config does not say quick_gelu: GELU is assumed and cannot be "
            "checked.",
            stacklevel=3,
        )


def _golden_images() -> Tensor:
    """Return two fixed images (2, 3, 48, 64) uint8, waves and blocks; no model's size, so resizing is tested too."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    waves = torch.stack([torch.sin(x / 9 + y / (5 + 3 * c)) for c in range(3)]) * 110 + 128
    blocks = torch.stack([((x // 16 + 2 * (y // 12) + c) % 4) * 70 + 20 for c in range(3)])
    return torch.stack([waves, blocks]).to(torch.uint8)


def _golden(base: Base, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    return {"image_features": embed_images(base, images).cpu(), "text_features": embed_texts(base, texts).cpu()}


def _check_golden(base: Base, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        want = {k: f.get_tensor(k) for k in ("images", "image_features", "text_features")}
        texts = json.loads((f.metadata() or {}).get("texts", "[]"))

    def off() -> float:
        got = _golden(base, want["images"], texts)
        return max(float((got[k] - want[k]).abs().max()) for k in got)

    if (difference := off()) <= GOLDEN_TOLERANCE:
        return
    quick = base.model.config["model_cfg"]["quick_gelu"]
    for block in _blocks(base.model):
        block.mlp.gelu = nn.GELU() if quick else open_clip("transformer").QuickGELU()
    hint = (
        f'With {"GELU" if quick else "QuickGELU"} they agree: set "quick_gelu": {str(not quick).lower()} in {CONFIG}.'
        if off() <= GOLDEN_TOLERANCE
        else "Weights, tokenizer or preprocessing are not the ones it was saved with; get the folder again."
    )
    raise BadArtifact(
        f"{base.name} gives embeddings that differ by {difference:.1e} from those beside it in {file.name}. {hint}"
    )
