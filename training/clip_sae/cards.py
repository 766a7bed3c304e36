"""Make feature cards: for each SAE feature its top-activating images, its density and its nearest words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf

from patches.engine.read import record
from patches.evidence.feature_cards import Cards, best
from patches.families import clip
from patches.families.base import Base
from patches.mechanisms.features import SAE
from training.data.images import Dataset
from training.evidence import thumbnails
from training.progress import tqdm


@torch.inference_mode()
def make_cards(
    base: Base, sae: SAE, site: str, data: Dataset, words: Sequence[str], *, pictures: int = 9, kept: int = 5,
    thumb: int = 48, batch: int = 32,
) -> Cards:  # fmt: skip
    """Make a card for every feature of `sae` at `site` (B, T, D): strongest images, density, nearest words.

    Words come from the direct path: a feature's decoder row through the final norm's gain and the projection, as if no
    block came after `site`; effects through later blocks are not included.
    """
    F = len(sae.bias)
    fired, tokens = torch.zeros(F), 0
    largest, where, thumbs = [], [], []
    for part in tqdm(data.batches(batch), "feature cards", disable=None, leave=False):
        with record(base.model, [site]) as acts:
            clip.embed_images(base, part.image, batch=len(part))
        f = sae.encode(acts[site][0].float())  # (B, T, F)
        fired += (f > 0).sum((0, 1)).cpu()
        tokens += f.shape[0] * f.shape[1]
        top = f.max(1)
        largest.append(top.values.cpu())
        where.append(top.indices.cpu())
        thumbs.append(thumbnails(part.image, thumb))
    most, at = torch.cat(largest), torch.cat(where)
    picture, activation, token = best(most, at, pictures)

    visual = base.model.visual
    rows = sae.decoder.float()
    said = ((rows - rows.mean(1, keepdim=True)) * visual.ln_post.weight) @ visual.proj  # (F, k)
    cosine = nnf.normalize(said, dim=1) @ clip.embed_texts(base, words, clip.TEMPLATES).T
    cosine = cosine - cosine.mean(1, keepdim=True)
    top_words = cosine.topk(min(kept, len(words)), 1)
    return Cards(
        fired / max(tokens, 1), most.amax(0), picture, activation, token, top_words.indices.int().cpu(),
        top_words.values.cpu(), torch.cat(thumbs), tuple(words),
    )  # fmt: skip
