"""Tokens as answers show them: each one's own bytes, whatever its neighbours are, and a name for what is no text.

A token of several may be half a character, or begin with a space that decoding it alone would lose; so its bytes are
read off the vocabulary, as the tokenizer's own decoder would (byte-level BPE, or sentencepiece's pieces).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

SPACE = "\u2581"
"""sentencepiece's mark of a space"""


def _letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes (Radford et al. 2019): printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Pieces:
    """What the ids of one tokenizer are."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.added = {i: str(t) for i, t in getattr(self.tokenizer, "added_tokens_decoder", {}).items()}
        self.special = set(getattr(self.tokenizer, "all_special_ids", ()))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        how = _decoders(getattr(backend, "decoder", None))
        self.letters = _letters() if "ByteLevel" in how else {}
        self.marked = bool({"Metaspace", "Replace", "ByteFallback"} & how)

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text."""
        if token in self.added:
            return self.added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self.letters:
            known = [self.letters.get(c) for c in piece]
            return piece.encode() if None in known else bytes(b for b in known if b is not None)
        if self.marked:
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            return str(piece).replace(SPACE, " ").encode()
        return str(self.tokenizer.decode([token])).encode()

    def letters_of(self, tokens: Sequence[int]) -> int:
        """Characters that tokens add to a text together; special ones none."""
        return len(b"".join(self.bytes(i) for i in tokens if i not in self.special).decode(errors="ignore"))

    def text(self, token: int) -> str:
        """A token as a text, with U+FFFD where it is half a character."""
        return self.bytes(token).decode(errors="replace")

    def name(self, token: int) -> str:
        """A token as a text, or as `bytes:\\xe6\\xbc` where it is none (as OpenAI writes them)."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def _decoders(decoder: Any) -> set[str]:
    """Kinds of the steps of a `tokenizers` decoder."""
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    steps = state.get("decoders", [state])
    return {str(step.get("type")) for step in steps}
