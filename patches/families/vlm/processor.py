"""What turns a chat with pictures into token ids and pixels, for hub processors and for the lab's.

A prompt is a text or a list of messages {role, content}, whose content is a text or parts {"type": "text"|"image"} in
OpenAI's manner; pictures come beside it, in the order of their parts. Nothing is fetched.

Shapes: T prompt tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from registry.errors import Invalid

MAX_PICTURES = 8
"""pictures of one prompt"""


@dataclass(frozen=True)
class Prompt:
    """One row's prompt as the model takes it."""

    ids: list[int]
    """(T,) with one image token per feature"""
    pixels: dict[str, Tensor] = field(default_factory=dict)
    """what the tower takes, empty without pictures"""


@dataclass(frozen=True)
class Processor:
    """A hub processor (`LlavaProcessor` and its like) behind one small interface, and a tokenizer's where LLMs ask."""

    hub: Any
    tokenizer: Any
    image_token: int
    keys: tuple[str, ...]
    """outputs of the hub processor that belong to pictures"""

    def prompt(
        self, what: str | Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image] = (), begun: bool = False
    ) -> Prompt:
        """Ids and pixels of a text or a chat up to where the assistant speaks (begun: its turn stays open).

        Raises Invalid for more than MAX_PICTURES, for pictures that no part names, and for parts without a picture.
        """
        if len(pictures) > MAX_PICTURES:
            raise Invalid(f"There are {len(pictures)} pictures; a prompt takes {MAX_PICTURES} at most.")
        if isinstance(what, str):
            text, parts = what, what.count(self._mark)
            if pictures and not parts:
                text, parts = self._mark * len(pictures) + what, len(pictures)
        else:
            messages = [_message(m) for m in what]
            parts = sum(p["type"] == "image" for m in messages for p in m["content"])
            text = self._chat(messages, begun)
        if self._prepends:
            text = text.replace(self._mark, "")
        if parts != len(pictures):
            raise Invalid(f"The prompt names {parts} pictures and {len(pictures)} came with it.")
        if not pictures:
            ids = self.tokenizer(text, add_special_tokens=isinstance(what, str))["input_ids"]
            return Prompt(list(ids))
        out = self.hub(text=text, images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        ids = out["input_ids"][0].tolist()
        return Prompt(ids, {k: out[k] for k in self.keys if k in out})

    @property
    def _mark(self) -> str:
        return str(getattr(self.hub, "image_token", None) or self.tokenizer.convert_ids_to_tokens(self.image_token))

    @property
    def _prepends(self) -> bool:
        """InstructBLIP's processor puts the image tokens in front by itself, and knows no turns."""
        return hasattr(self.hub, "num_query_tokens")

    def _chat(self, messages: list[dict[str, Any]], begun: bool) -> str:
        if getattr(self.hub, "chat_template", None):
            return str(
                self.hub.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
                )
            )
        if self._prepends:
            return "\n".join(p["text"] for m in messages for p in m["content"] if p["type"] == "text")
        # models from before templates: LLaVA-1.5's own words
        turns = []
        for m in messages:
            said = "".join(self._mark + "\n" if p["type"] == "image" else p["text"] for p in m["content"])
            turns.append(said if m["role"] == "system" else f"{m['role'].upper()}: {said}")
        return "\n".join(turns) + ("" if begun else "\nASSISTANT:")

    # ---- what the decoder of `llm` asks a tokenizer -------------------------------------------------------------

    def __call__(self, text: Any, **how: Any) -> Any:
        return self.tokenizer(text, **how)

    def decode(self, ids: Sequence[int], **how: Any) -> str:
        return str(self.tokenizer.decode(ids, **how))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> Any:
        """The text of a chat (never its ids)."""
        return self._chat([_message(m) for m in messages], bool(how.get("continue_final_message")))

    @property
    def eos_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def word(self, text: str) -> list[int]:
        """Ids of a word as it stands inside a sentence (with its leading space, where the tokenizer has such).

        Raises Invalid for a word the vocabulary cannot say.
        """
        plain = text.strip()
        ids = list(self.tokenizer(" " + plain, add_special_tokens=False)["input_ids"]) if plain else []
        unknown = self.tokenizer.unk_token_id
        lost = ids and _tight(self.tokenizer.decode(ids)) != _tight(plain)  # a tokenizer may not name its unknown token
        if not ids or lost or (unknown is not None and unknown in ids):
            raise Invalid(f"The word {text[:60]!r} is not in this model's vocabulary; name another.")
        space = self.tokenizer(" ", add_special_tokens=False)["input_ids"]
        if len(ids) > 1 and [ids[0]] == list(space) and _tight(self.tokenizer.decode(ids[1:])) == _tight(plain):
            ids = ids[1:]  # a space that stands alone is no part of the word
        return ids


def _tight(text: str) -> str:
    """Text as tokenizers may change it and mean the same: without blanks, case and compatible forms."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _message(m: Mapping[str, Any]) -> dict[str, Any]:
    content = m["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(p) for p in content]
    return {"role": m["role"], "content": [p if p["type"] == "text" else {"type": "image"} for p in parts]}


class LabProcessor:
    """The lab's own: pictures of any size become 192 px squares, and every question one of those it was taught."""

    chat_template = "lab"

    def __init__(
        self, tokenizer: Any, side: int, tile: int, mean: Sequence[float], std: Sequence[float], mark: str = "<image>"
    ) -> None:
        self.tokenizer, self.side, self.size, self.image_token = tokenizer, side, side * tile, mark
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        """<bos>, a mark per picture, then the last question if it is one of the three kinds the decoder was taught
        ("is there a X ?", "how many things ?"), else "describe :"; what the assistant has begun comes after."""
        parts = [p for m in messages for p in m["content"]]
        begun = ""
        asked = [m for m in messages if m["role"] == "user"]
        if how.get("continue_final_message") and messages[-1]["role"] == "assistant":
            begun = " " + "".join(p["text"] for p in messages[-1]["content"] if p["type"] == "text")
        text = " ".join(p["text"] for p in asked[-1]["content"] if p["type"] == "text").lower() if asked else ""
        known = re.search(r"is there an? ([a-z ]+?)( in the (picture|image))?\s*[?.]|how many things", text + "?")
        question = "describe :" if not known else f"is there a {known[1]} ?" if known[1] else "how many things ?"
        return "<bos>" + self.image_token * sum(p["type"] == "image" for p in parts) + question + begun

    def __call__(self, text: str, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        size = (self.size, self.size)
        pictures = [p if p.size == size else p.resize(size, Image.Resampling.BICUBIC) for p in images]
        raw = torch.stack([_bytes(p) for p in pictures])
        spread = text.replace(self.image_token, self.image_token * self.side**2)
        ids = self.tokenizer(spread, add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor([ids]), "pixel_values": (raw.float() / 255 - self.mean) / self.std}


class ChatProcessor(LabProcessor):
    """The same pictures for a language model with a chat template of its own: marks stand before the message's text."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        """The text of a chat in the language model's own template."""
        plain = [
            {
                "role": m["role"],
                "content": "".join(self.image_token if p["type"] == "image" else p["text"] for p in m["content"]),
            }
            for m in messages
        ]
        return str(self.tokenizer.apply_chat_template(plain, **{"tokenize": False, **how}))


def _bytes(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    from torchvision.transforms.functional import pil_to_tensor

    out: Tensor = pil_to_tensor(picture)
    return out
