"""The planted head."""

from __future__ import annotations

import pytest
import torch

from patches.families import clip
from patches.families.clip.direct import Lens
from tests.training.clip_heads.some import PLANTED


@pytest.fixture(scope="module")
def planted():
    """A tiny CLIP, by hand: a token is its patch's mean colour, head 2.1 reads how red it is everywhere and writes the
    embedding of "red", nothing else does anything."""
    base = clip.tiny()
    visual = base.model.visual
    with torch.no_grad():
        visual.conv1.weight.zero_()
        for c in range(3):
            visual.conv1.weight[c, c] = 1 / 64
            visual.conv1.weight[3 + c, c] = -1 / 64  # so that tokens have mean 0 over features
        visual.positional_embedding.zero_()
        visual.class_embedding.zero_()
        visual.class_embedding[6:8] = torch.tensor([1.0, -1.0])
        for ln in (visual.ln_pre, visual.ln_post, *(b.ln_1 for b in visual.transformer.resblocks)):
            ln.weight.fill_(1)
            ln.bias.zero_()
        for block in visual.transformer.resblocks:
            for p in (block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj.weight,
                      block.attn.out_proj.bias, block.mlp.c_proj.weight, block.mlp.c_proj.bias):  # fmt: skip
                p.zero_()
        layer, h = PLANTED
        attn = visual.transformer.resblocks[layer].attn
        attn.in_proj_weight[64 + 8 * h, :3] = torch.tensor([1.0, -0.5, -0.5])  # queries and keys are 0: it looks evenly
        t = clip.embed_texts(base, ["red"])[0]
        way = Lens(base).readout.map
        attn.out_proj.weight[:, 8 * h] = 3 * (t @ torch.linalg.pinv(way))
    return base
