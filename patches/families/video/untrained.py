"""Checkpoints of published sizes before any training, `untrained:NAME`: what a run of the paper is compared with.

Weights are drawn from seed 0 and lie in no file, so a manifest that names one says exactly what it was. They have no
head: whoever compares with one fits a probe on its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from patches.families.video.model import MaskedVideo, VideoModel
from patches.families.video.tokens import RESERVED, Codebook, TokenVideo
from registry.errors import NotFound


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama; `tied`: one matrix embeds codes and predicts them."""

    width: int
    depth: int
    heads: int
    hidden: int
    tied: bool = False

    @property
    def body(self) -> int:
        """Weights of the blocks and norms, embeddings left out."""
        return self.depth * (4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width) + self.width


TOTO: dict[str, Decoder] = {
    "base": Decoder(768, 12, 12, 3072, True),
    "large": Decoder(1024, 16, 16, 4096, True),
    "1b": Decoder(2048, 22, 16, 5632),
}
"""Toto's published sizes. FFN widths are those whose counts fit the published 120M, 280M and 1.1B; none are printed"""
CODES, FRAMES, IMAGE, PATCH = 8192, 16, 128, 8
"""the paper's dVAE has 8,192 codes and cuts a frame of 128 px into 16 x 16"""
NAMES = ("videomae-base", *(f"toto-{name}" for name in TOTO))


def untrained(name: str) -> VideoModel:
    """The model `name` says, in eval mode. Raises NotFound with the names there are."""
    if name not in NAMES:
        raise NotFound(f"There is no untrained:{name[:40]}. There are: {', '.join(f'untrained:{n}' for n in NAMES)}.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (_masked() if name.startswith("videomae") else _tokens(TOTO[name.partition("-")[2]])).eval()


def _masked() -> MaskedVideo:
    """VideoMAE ViT-B as transformers' config has it: 16 frames of 224 px, tubes of 2 x 16 x 16."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    return MaskedVideo(VideoMAEForPreTraining(VideoMAEConfig(norm_pix_loss=True)))


def _tokens(size: Decoder) -> TokenVideo:
    positions = FRAMES * (IMAGE // PATCH) ** 2 + 2
    lm = llama(size.width, size.depth, size.heads, RESERVED + CODES, positions, size.hidden, tied=size.tied)
    return TokenVideo(lm, Codebook(torch.rand(CODES, 3 * PATCH**2) - 0.5, PATCH, 1, False), FRAMES, IMAGE)


def llama(width: int, depth: int, heads: int, vocabulary: int, positions: int, hidden: int = 0, spread: float = 0.02,
          theta: float = 10_000.0, tied: bool = False) -> Any:  # fmt: skip
    """A new Llama without end or pad tokens of its own: ids 1 to 3 are Toto's marks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden or 4 * width, num_hidden_layers=depth,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=positions,
            initializer_range=spread, bos_token_id=1, eos_token_id=None, pad_token_id=None, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="sdpa",
        )
    )  # fmt: skip
