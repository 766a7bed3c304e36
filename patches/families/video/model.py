"""What every video model answers, whatever it was trained by: features by layer and class scores of clips of bytes.

`MaskedVideo` is transformers' VideoMAE, `TokenVideo` (patches.families.video.tokens) a language model over visual
tokens. Both take clips (b, T, 3, R, R) uint8 of the model's own T and R, and are called by keyword: the wrapper is the
root whose inputs patches read, `blocks.{i}` the sites they edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import VideoMAEForPreTraining

from patches.families.video import videomae
from patches.families.video.pixels import IMAGENET_MEAN, IMAGENET_STD, Still, normalise, patchify, split, unpatchify
from patches.families.video.probe import Probe
from registry.errors import PatchError

Head = Literal["classifier", "probe"]


class VideoModel(nn.Module, ABC):
    """A checkpoint of either kind behind one interface."""

    kind: Literal["videomae", "toto"]
    frames: int
    size: int
    classes: tuple[str, ...]
    blocks: nn.ModuleList
    probe: Probe | None
    unit: str
    """what `surprise` counts in"""
    probe_layer: int
    """the layer whose features the probe reads: 0 is the embedding, `depth` the last block"""

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def head(self) -> Head | None:
        """What class scores come from; None if this checkpoint gives none."""
        return "probe" if self.probe is not None else None

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Slices of time, and patches along a side of each: features are (slices * side * side, d)."""

    @abstractmethod
    def states(self, clips: Tensor) -> list[Tensor]:
        """Features (b, N, d) after the embedding and after every block."""

    @property
    def cell(self) -> int:
        """Pixels of a frame that one place of the grid stands for, along a side."""
        return self.size // self.grid[1]

    def matching(self, clips: Tensor) -> list[Tensor]:
        """Features by which a thing is found again in later frames, by layer: places in raster order, slice after
        slice, all slices read by the same means."""
        return self.states(clips)

    def features(self, clips: Tensor, layer: int | None = None) -> Tensor:
        """Features (b, N, d) after block `layer` (0: the embedding; None: the last)."""
        found = self.states(clips)
        return found[self.depth if layer is None else layer]

    def scores(self, clips: Tensor, states: Sequence[Tensor] | None = None) -> Tensor:
        """Class scores (b, C); states: of these clips, if they are known. Raises PatchError without a head."""
        if self.probe is None:
            raise PatchError("This checkpoint has no classifier and no probe; ask for its features instead.")
        found = self.states(clips) if states is None else states
        out: Tensor = self.probe(found[self.probe_layer])
        return out

    @abstractmethod
    def surprise(self, clips: Tensor) -> Tensor:
        """How badly each frame is predicted (b, T): nats a token, or squared error of pixels in [0, 1]."""

    def forward(self, clips: Tensor) -> dict[str, Any]:
        """`states`, a list of (b, N, d), and `scores` (b, C) or None."""
        states = self.states(clips)
        return {"states": states, "scores": self.scores(clips, states) if self.head else None}


class MaskedVideo(VideoModel):
    """transformers' VideoMAE: an encoder with a decoder, a fine-tuned classifier, a probe, or several of these."""

    kind = "videomae"
    unit = "squared error of hidden pixels"

    def __init__(
        self, net: Any, classes: Sequence[str] = (), probe: Probe | None = None, probe_layer: int = 0,
        classifier: Any = None, still: Still = "keep", mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:  # fmt: skip
        """net: VideoMAEForPreTraining or VideoMAEForVideoClassification; classifier: a fine-tuned copy with its own
        encoder, which scores are then taken from."""
        super().__init__()
        self.net, self.probe, self.probe_layer = net, probe, probe_layer
        self.classifier = net if classifier is None and hasattr(net, "classifier") else classifier
        self.classes, self.still, self.mean, self.std = tuple(classes), still, tuple(mean), tuple(std)
        self.frames, self.size = net.config.num_frames, net.config.image_size
        self.blocks = net.videomae.encoder.layer

    @property
    def head(self) -> Head | None:
        return "classifier" if self.classifier is not None else super().head

    @property
    def grid(self) -> tuple[int, int]:
        c = self.net.config
        return c.num_frames // c.tubelet_size, c.image_size // c.patch_size

    @property
    def decodes(self) -> bool:
        return isinstance(self.net, VideoMAEForPreTraining)

    def patches(self, clips: Tensor) -> Tensor:
        """(b, N, D) normalised patches of bytes."""
        c = self.net.config
        return patchify(normalise(clips, self.mean, self.std, self.still), c.tubelet_size, c.patch_size)

    def states(self, clips: Tensor) -> list[Tensor]:
        return videomae.states(self.net.videomae, self.patches(clips))

    def scores(self, clips: Tensor, states: Sequence[Tensor] | None = None) -> Tensor:
        if self.classifier is None:
            return super().scores(clips, states)
        return videomae.classify(self.classifier, self.patches(clips))

    def reconstruct(
        self, clips: Tensor, ratio: float = 0.75, mask: Literal["tube", "random"] = "tube", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Hide a share of each clip's patches and predict them.

        Returns the clips with the predictions in place of what was hidden (b, T, 3, R, R) in [0, 1], which pixels were
        hidden (b, T, R, R) bool, and the mean squared error there (b,). What the model never sees is borrowed from the
        clip: what `still` took away, and with normalised targets each hidden patch's own mean and deviation.
        """
        if not self.decodes:
            raise PatchError(
                "This checkpoint is a classifier: its decoder was left behind, so it reconstructs nothing."
            )
        c = self.net.config
        slices, places = videomae.grid(c)
        g = torch.Generator().manual_seed(seed)
        # the same places in every clip, so that a clip's answer does not depend on its neighbours
        keep, hide = (i.to(clips.device).expand(len(clips), -1) for i in split(1, slices, places, ratio, g, mask))
        patches = self.patches(clips)
        out = videomae.reconstruct(self.net, patches, keep, hide).float().unflatten(-1, (-1, 3))
        std, centre = out.new_tensor(IMAGENET_STD), out.new_tensor(IMAGENET_MEAN)
        true = videomae.take(patches, hide).unflatten(-1, (-1, 3)) * std + centre
        if c.norm_pix_loss:
            out = out * (true.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6) + true.mean(-2, keepdim=True)
        given = patchify(clips.float() / 255, c.tubelet_size, c.patch_size)
        whole = given.scatter_add(1, hide[..., None].expand(-1, -1, given.shape[-1]), (out - true).flatten(-2))
        hidden = torch.zeros_like(given[..., :1]).scatter_(1, hide[..., None], 1.0).expand(-1, -1, given.shape[-1])
        error = (out - true).square().mean((1, 2, 3))
        back = (self.frames, self.size, c.tubelet_size, c.patch_size)
        return unpatchify(whole, *back).clamp(0, 1), unpatchify(hidden, *back)[:, :, 0] > 0.5, error

    def surprise(self, clips: Tensor) -> Tensor:
        """(b, T) mean squared error of hidden pixels by frame, over four random masks."""
        total, count = torch.zeros(clips.shape[:2]), torch.zeros(clips.shape[:2])
        for seed in range(4):
            made, hidden, _ = self.reconstruct(clips, 0.75, "random", seed)
            off = (made - clips.float() / 255).square().mean(2) * hidden
            total, count = total + off.sum((2, 3)).cpu(), count + hidden.sum((2, 3)).cpu()
        return total / count.clamp_min(1)
