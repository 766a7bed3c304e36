"""CLIP: open_clip models with a plain vision transformer, and transformers' CLIPModel, in one layout."""

from patches.families.clip.attention import Attention, explicit_attention
from patches.families.clip.base import Processor, load, new, save, tiny
from patches.families.clip.convert import knows
from patches.families.clip.embeddings import (
    TEMPLATES,
    check_told_apart,
    doubts,
    embed_images,
    embed_texts,
    logit_scale,
    unknown_words,
    zero_shot,
)
from patches.families.clip.labelled import TABLE, predict
from patches.families.clip.layout import CONFIG, GOLDEN, SHIPPED, SITES, TEXT_SITES, WEIGHTS, site
from patches.families.clip.tokens import compact_tokenizer
from patches.families.clip.towers import fold
from patches.families.clip.worker import made
from patches.families.family import Family

__all__ = [
    "CONFIG", "FAMILY", "GOLDEN", "SHIPPED", "SITES", "TEMPLATES", "TEXT_SITES", "WEIGHTS", "Attention", "Processor",
    "check_told_apart", "compact_tokenizer", "doubts", "embed_images", "embed_texts", "explicit_attention", "load",
    "logit_scale", "new", "save", "site", "tiny", "unknown_words", "zero_shot",
]  # fmt: skip

FAMILY = Family(
    name="clip",
    load=load,
    tiny=tiny,
    worker=made,
    table=TABLE,
    predict=predict,
    example="lab:clip",
    sites=SITES,
    fold=fold,
    engine="patches.families.clip.towers",
    knows=knows,
)
