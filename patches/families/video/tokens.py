"""Toto: a language model over visual tokens (arXiv 2501.05453), and the tokenizer that makes them.

A clip becomes `start, frame 0's tokens in raster order, frame 1's, ..., end`. The paper tokenises with a dVAE and marks
sequences with the tokens 1 (a video starts), 3 (pictures start) and 2 (the end), so those ids are reserved and codes
begin at 4. Here the tokenizer is k-means over patches; a folder may bring any codebook of patches, or a convolutional
tokenizer (`convolved`).

residual: frame 0 is tokenised as it is, every later frame as its difference from the frame before, both causal. On
still grounds this is what makes a token say how things move; without it every frame is tokenised by itself, as in the
paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn
from transformers import DynamicCache

from patches.families.video.convolved import Convolved
from patches.families.video.model import VideoModel
from patches.families.video.probe import Probe
from registry.errors import Invalid

VIDEO, END, PICTURES, RESERVED = 1, 2, 3, 4
"""ids of the paper's marks, and where codes begin"""
Start = Literal["video", "pictures"]


class Codebook(nn.Module):
    """Patches of frames <-> codes, by the nearest of V centres."""

    codes: Tensor
    paints = True
    """Whether codes become pictures again"""

    def __init__(self, codes: Tensor, patch: int, shrink: int, residual: bool) -> None:
        """codes (V, 3 patch^2); shrink: frames are averaged down this much first."""
        super().__init__()
        self.register_buffer("codes", codes.float())
        self.patch, self.shrink, self.residual = patch, shrink, residual

    @property
    def cell(self) -> int:
        """Pixels of a frame that one token stands for, along a side."""
        return self.patch * self.shrink

    def patches(self, clips: Tensor) -> Tensor:
        """Bytes (b, T, 3, R, R) -> (b, T, n, 3 patch^2) float32, differences after frame 0 if residual."""
        b, frames = clips.shape[:2]
        x = clips.float().flatten(0, 1) / 255 - 0.5
        x = nnf.avg_pool2d(x, self.shrink) if self.shrink > 1 else x
        x = x.view(b, frames, *x.shape[1:])
        if self.residual:
            x = torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)
        return self._cut(x)

    def _cut(self, x: Tensor) -> Tensor:
        out = nnf.unfold(x.flatten(0, 1), self.patch, stride=self.patch).transpose(1, 2)
        return out.reshape(*x.shape[:2], *out.shape[1:])

    def encode(self, clips: Tensor) -> Tensor:
        """Codes (b, T, n) int64 below V, where the codebook lies."""
        x = self.patches(clips.to(self.codes.device))
        near = [
            (self.codes.square().sum(1) - 2 * part @ self.codes.T).argmin(1) for part in x.flatten(0, 2).split(65536)
        ]
        return torch.cat(near).view(x.shape[:3])

    def decode(self, codes: Tensor, size: int, before: Tensor | None = None) -> Tensor:
        """Codes (b, T, n) -> frames (b, T, 3, size, size) in [0, 1].

        before: frame (b, 3, size, size) in [0, 1] that the first of these differs from; None: it stands for itself.
        """
        return self.paint(self.codes[codes], size, before)

    def paint(self, patches: Tensor, size: int, before: Tensor | None = None) -> Tensor:
        """The same for patches (b, T, n, 3 patch^2) that need be no centres: a mean of several, say."""
        b, frames = patches.shape[:2]
        side = size // self.shrink
        x = nnf.fold(patches.flatten(0, 1).transpose(1, 2), (side, side), self.patch, stride=self.patch)
        if self.shrink > 1:
            x = nnf.interpolate(x, scale_factor=self.shrink, mode="bilinear", align_corners=False)
        x = x.view(b, frames, 3, size, size)
        if not self.residual:
            return (x + 0.5).clamp(0, 1)
        if before is None:
            return (x.cumsum(1) + 0.5).clamp(0, 1)
        return (before[:, None] + x.cumsum(1)).clamp(0, 1)


def kmeans(x: Tensor, count: int, g: Generator, rounds: int = 15) -> Tensor:
    """`count` centres (count, D) of points x (n, D) by Lloyd's rounds; an empty one moves to a random point."""
    codes = x[torch.randperm(len(x), generator=g)[:count]].clone()
    for _ in range(rounds):
        near = torch.cat([(codes.square().sum(1) - 2 * part @ codes.T).argmin(1) for part in x.split(65536)])
        held = torch.bincount(near, minlength=count)
        codes = torch.zeros_like(codes).index_add_(0, near, x) / held.clamp_min(1)[:, None]
        empty = held == 0
        codes[empty] = x[torch.randint(len(x), (int(empty.sum()),), generator=g)]
    return codes


def sequence(codes: Tensor, start: Start = "video") -> Tensor:
    """Codes (b, T, n) -> ids (b, 1 + T n + 1): the start mark, codes from RESERVED on, the end mark."""
    ids = nnf.pad(codes.flatten(1) + RESERVED, (1, 1))
    ids[:, 0], ids[:, -1] = VIDEO if start == "video" else PICTURES, END
    return ids


class TokenVideo(VideoModel):
    """A decoder language model over a codebook's tokens."""

    kind = "toto"
    unit = "nats a token"

    def __init__(
        self, lm: Any, codebook: Codebook | Convolved, frames: int, size: int, classes: Sequence[str] = (),
        probe: Probe | None = None, probe_layer: int = 0,
    ) -> None:  # fmt: skip
        """lm: transformers' LlamaForCausalLM with a vocabulary of RESERVED + V."""
        super().__init__()
        self.lm, self.codebook, self.frames, self.size = lm, codebook, frames, size
        self.classes, self.probe, self.probe_layer = tuple(classes), probe, probe_layer
        self.blocks = lm.model.layers

    @property
    def grid(self) -> tuple[int, int]:
        return self.frames, self.size // self.codebook.cell

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return (self.size // self.codebook.cell) ** 2

    def states(self, clips: Tensor) -> list[Tensor]:
        """Features (b, T n, d) at every code: what the model knows once it has read that code."""
        return self.token_states(sequence(self.codebook.encode(clips)))

    def token_states(self, ids: Tensor) -> list[Tensor]:
        """The same for ids (b, 1 + T n + 1)."""
        out: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _, __, y: out.append(y[0] if isinstance(y, tuple) else y))
                 for block in self.blocks]  # fmt: skip
        try:
            self.lm.model(input_ids=ids[:, :-1], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [x[:, 1:] for x in (self.lm.model.embed_tokens(ids[:, :-1]), *out)]

    def matching(self, clips: Tensor) -> list[Tensor]:
        """Features (b T, n, d) of every frame of clips (b, T, 3, R, R), T any number, read alone as a packed picture:
        in a clip's own tokens the first frame and the differences after it are of two kinds."""
        return self.token_states(sequence(self.codebook.encode(clips.flatten(0, 1)[:, None]), "pictures"))

    def nll(self, ids: Tensor) -> Tensor:
        """Nats of each code given all before it (b, T n), of ids (b, 1 + T n + 1); the end mark is left out."""
        logits = self.lm(input_ids=ids[:, :-2], use_cache=False).logits.float()
        return nnf.cross_entropy(logits.transpose(1, 2), ids[:, 1:-1], reduction="none")

    def surprise(self, clips: Tensor) -> Tensor:
        """(b, T) mean nats a token, by frame."""
        off = self.nll(sequence(self.codebook.encode(clips)))
        return off.view(len(off), self.frames, -1).mean(2)

    def rollout(
        self, clips: Tensor, given: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0, cached: bool = True,
        expected: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Go on from the first `given` frames of clips (b, T, 3, R, R) to the model's full length.

        Returns frames (b, T, 3, R, R) in [0, 1], the given ones as they came, and the nats of each new code
        (b, new, n). temperature 0 is greedy. Raises as `roll`.
        """
        made = list(self.roll(clips, given, temperature, top_k, seed, cached, expected))
        shown = clips[:, :given].float() / 255
        return torch.cat([shown, *(frame[:, None] for frame, _ in made)], 1), torch.stack([off for _, off in made], 1)

    def roll(
        self, clips: Tensor, given: int, temperature: float = 0.0, top_k: int = 0, seed: int = 0, cached: bool = True,
        expected: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Frame after frame (b, 3, R, R) with the nats of its codes (b, n), drawn token by token with a KV cache.

        cached=False recomputes everything for each token: the reference the cache is tested against. expected=True
        paints the mean patch under the model's distribution in place of the code that was drawn, which is the picture
        of least squared error: where the likeliest single code is "nothing changes", it still says what may. Reserved
        ids are never drawn. Raises Invalid unless at least one frame is given and one is left to draw.
        """
        if not 1 <= given < self.frames:
            raise Invalid(f"given={given}: from 1 to {self.frames - 1} of this model's {self.frames} frames.")
        if not self.codebook.paints:
            raise Invalid(
                "This model's tokenizer has no decoder, so a rollout cannot be painted; ask for its surprise."
            )
        n, g = self.per_frame, Generator().manual_seed(seed)
        ids = sequence(self.codebook.encode(clips[:, :given]))[:, :-1]
        cache = DynamicCache() if cached else None
        feed, before = ids, clips[:, given - 1].float() / 255
        for _ in range(self.frames - given):
            off: list[Tensor] = []
            mean: list[Tensor] = []
            for _ in range(n):
                out = self.lm(input_ids=feed, past_key_values=cache, use_cache=cached, logits_to_keep=1)
                scores = out.logits[:, -1].float()
                scores[:, :RESERVED] = -torch.inf
                one = _draw(scores, temperature, top_k, g)
                log_p = scores.log_softmax(-1)
                off.append(-log_p.gather(1, one)[:, 0])
                if expected:
                    mean.append(log_p[:, RESERVED:].exp() @ self.codebook.codes)
                ids = torch.cat([ids, one], 1)
                feed = one if cached else ids
            made = (ids[:, -n:] - RESERVED)[:, None]
            patches = torch.stack(mean, 1)[:, None] if expected else self.codebook.codes[made]
            before = self.codebook.paint(patches, self.size, before)[:, 0]
            yield before, torch.stack(off, 1)


def _draw(scores: Tensor, temperature: float, top_k: int, g: Generator) -> Tensor:
    """(b, 1) ids drawn from scores (b, V)."""
    if temperature <= 0:
        return scores.argmax(-1, keepdim=True)
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    # on the CPU, so that a seed draws the same on every device
    return torch.multinomial((scores / temperature).softmax(-1).cpu(), 1, generator=g).to(scores.device)
