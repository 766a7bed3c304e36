"""Tokenizers of CLIP text towers: loaded from a folder, or compact ones made for a small vocabulary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches import lean
from patches.families.clip.library import open_clip
from registry import manifest
from registry.errors import NotFound

PLAIN = {
    "backend", "bos_token", "clean_up_tokenization_spaces", "eos_token", "is_local", "local_files_only",
    "model_max_length", "pad_token", "tokenizer_class", "unk_token",
}  # fmt: skip
"""keys of a tokenizer_config.json that change nothing of what tokenizer.json says"""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


# ---- tokenizers ------------------------------------------------------------------------------------------------


def compact_tokenizer(texts: Iterable[str]) -> Any:
    """Cut CLIP's own tokenizer down to the words of `texts`, as a transformers tokenizer that can be saved.

    A known word splits into the same pieces as with the full tokenizer; any other word becomes one <unk>. All merges on
    the way to a known word are kept, in order, so the same merge wins at every step.
    """
    import regex
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    full = open_clip("tokenizer").SimpleTokenizer()
    words = sorted({w for text in texts for w in full.pat.findall(full.clean_fn(text))})
    merges: set[tuple[str, str]] = set()
    pieces: set[str] = set()
    for word in words:
        parts = [full.byte_encoder[b] for b in word.encode()]
        parts[-1] += "</w>"
        pieces.update(parts)
        while pairs := [p for p in itertools.pairwise(parts) if p in full.bpe_ranks]:
            best = min(pairs, key=full.bpe_ranks.__getitem__)
            merges.add(best)
            joined: list[str] = []
            for part in parts:
                if joined and not joined[-1].endswith("</w>") and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
            pieces.update(parts)
    order = ["<pad>", "<unk>", *sorted(pieces, key=full.encoder.__getitem__)]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(order)},
            merges=sorted(merges, key=full.bpe_ranks.__getitem__),
            unk_token="<unk>",
            fuse_unk=True,
            end_of_word_suffix="</w>",
        )
    )
    letters = "|".join(regex.escape(w) for w in words if w.isalpha())
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(
                Regex(rf"(?<![\p{{L}}'])(?!(?:{letters})(?!\p{{L}}))\p{{L}}+"), "\N{REPLACEMENT CHARACTER}"
            ),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _with_ends(inner)


def _letters(vocab: int) -> Any:
    """Build a transformers tokenizer whose tokens are single characters."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = ["<pad>", "<unk>", *(chr(c) for c in range(32, 128))][: vocab - 2]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return _with_ends(inner)


def _with_ends(inner: Any) -> Any:
    """Add CLIP's start and end tokens around every text; the end token has the highest id, by which CLIP pools."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    start, end = "<start_of_text>", "<end_of_text>"
    inner.add_special_tokens(["<pad>", "<unk>", start, end])
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(w, inner.token_to_id(w)) for w in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end
    )


def _tokenizer(folder: Path, text_cfg: Mapping[str, Any]) -> tuple[Callable[[list[str]], Tensor], str]:
    """Load the tokenizer a config asks for, and the string that identifies it in a digest."""
    tokenizers = open_clip("tokenizer")
    context, more = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs") or {}
    if not text_cfg.get("hf_tokenizer_name"):
        return tokenizers.SimpleTokenizer(context_length=context, **more), f"open_clip {manifest.digest_of(more)[:8]}"
    files = [folder / f for f in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / f).is_file()]
    if not files:
        raise NotFound(
            f"The text tower wants the tokenizer {text_cfg['hf_tokenizer_name'][:60]!r}, and {folder} has none. Put "
            "its tokenizer.json and tokenizer_config.json beside the weights."
        )
    identity = manifest.digest_of([more, *(manifest.sha256(f) for f in files)])
    if lean.only_serves and not more and not text_cfg.get("tokenizer_mode") and (own := _Words.read(folder, context)):
        return own, identity
    tokenizer = tokenizers.HFTokenizer(
        str(folder), context_length=context, tokenizer_mode=text_cfg.get("tokenizer_mode"), **{"use_fast": True, **more}
    )
    return tokenizer, identity


class _Ids:
    """Token ids of texts, as a transformers tokenizer of the same file gives them."""

    def __init__(self, tokenizer: Any, unknown: str | None) -> None:
        self._tokenizer = tokenizer
        self.unk_token_id = None if unknown is None else tokenizer.token_to_id(unknown)

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        made = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [e.ids for e in made]}


class _Words:
    """What open_clip's HFTokenizer does with a file that says it all, without transformers, a second of a start."""

    def __init__(self, file: Path, about: Mapping[str, Any], context: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = _Ids(Tokenizer.from_file(str(file)), about.get("unk_token"))
        padded, pad = Tokenizer.from_file(str(file)), about["pad_token"]
        padded.enable_truncation(context)
        padded.enable_padding(length=context, pad_id=padded.token_to_id(pad), pad_token=pad)
        self._padded = _Ids(padded, None)
        self._clean = open_clip("tokenizer").get_clean_fn("whitespace")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(self._padded([self._clean(text) for text in texts])["input_ids"])

    @classmethod
    def read(cls, folder: Path, context: int) -> _Words | None:
        """The folder's tokenizer, if it is a plain one whose named tokens are all in tokenizer.json; else None."""
        file, told = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not file.is_file() or not told.is_file():
            return None
        about = json.loads(told.read_text())
        plain = about.keys() <= PLAIN and about.get("tokenizer_class") in (
            "TokenizersBackend",
            "PreTrainedTokenizerFast",
        )
        known = {t["content"] for t in json.loads(file.read_text()).get("added_tokens", ())}
        named = {v for k, v in about.items() if k.endswith("_token")}
        if not plain or "pad_token" not in about or not all(isinstance(t, str) and t in known for t in named):
            return None
        return cls(file, about, context)
