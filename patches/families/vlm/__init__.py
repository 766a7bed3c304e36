"""Vision-language models in transformers' layouts (LLaVA, LLaVA-NeXT, Idefics3, SmolVLM, Qwen-VL, InstructBLIP) and
the lab's own: what stands in an image token, and the decoder that reads it."""

from patches.families.family import Family
from patches.families.vlm.base import depth, knows, load, parts, site, tiny
from patches.families.vlm.chat import encode, generate, maker, predict, row
from patches.families.vlm.layouts import LAYOUTS, image_token, image_tokens, layout
from patches.families.vlm.table import TABLE
from patches.families.vlm.worker import Picture, PictureDecoder

__all__ = [
    "FAMILY", "LAYOUTS", "Picture", "PictureDecoder", "depth", "encode", "generate", "image_token", "image_tokens",
    "layout", "load", "maker", "row", "site", "tiny",
]  # fmt: skip

FAMILY = Family(
    name="vlm",
    load=load,
    tiny=tiny,
    worker=PictureDecoder.of,
    table=TABLE,
    predict=predict,
    example="lab:vlm",
    prompt=maker,
    sees=True,
    parts=parts,
    sites={"block": "model.language_model.layers.{i}"},
    knows=knows,
)
