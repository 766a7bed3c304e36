"""Cached activations of one layer for a data set, so that a candidate edit reruns only the layers above it.

Shapes: n images, T tokens (the class token first), D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.engine.edits import Act, Inputs
from patches.engine.read import upto
from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.families.base import Base
from patches.mechanisms.features import FeatureEdit
from training.clip_sae import room
from training.clip_sae.steerability import rest
from training.data.images import Dataset
from training.tasks.recognition import Answers, Asked, other_of

Hook = Literal["block", "mlp"]
"""Site of a layer: its residual stream output (resid_post), or the output of its MLP (mlp_out)"""


class Layered(Asked, Protocol):
    """The fields of a config that say where activations are recorded."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def hook(self) -> Hook: ...


@dataclass(frozen=True)
class Stream:
    """Cached activations of one layer for a data set, so that a candidate edit reruns only the layers above it."""

    x: Tensor
    """(n, T, D) activations at the site"""
    z: Tensor
    """(n, T, D) residual stream after the block; x itself if that is the site"""
    label: Tensor
    """(n,) index of the true class"""
    other: Tensor
    """(n,) spurious cue, see recognition.Answers"""
    device: torch.device | None = None
    """Device of the base; None: where x lies"""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def here(self) -> torch.device:
        """Device that batches are worked on."""
        return self.x.device if self.device is None else self.device

    def rows(self, at: Tensor) -> Stream:
        """Select the images with indices `at`, as they are kept."""
        x, kept = self.x[at.to(self.x.device)], at.to(self.label.device)
        z = x if self.x is self.z else self.z[at.to(self.x.device)]
        return Stream(x, z, self.label[kept], self.other[kept], self.device)

    def parts(self, size: int = 32) -> Iterator[Stream]:
        """Yield consecutive batches of at most `size` images, in float32 on the base's device."""
        for i in range(0, len(self), size):
            at = slice(i, i + size)
            x = self.x[at].to(self.here, torch.float32)
            z = x if self.x is self.z else self.z[at].to(self.here, torch.float32)
            yield Stream(x, z, self.label[at], self.other[at])

    def mean(self) -> Tensor:
        """Return the mean activation (D,) over images and tokens."""
        if self.x.dtype == torch.float32:
            return self.x.mean((0, 1)).to(self.here)
        total = sum(part.x.sum((0, 1), dtype=torch.float64) for part in self.parts())
        assert isinstance(total, Tensor)
        return (total / (len(self) * self.x.shape[1])).float()

    def size(self) -> float:
        """Return the mean norm of a token."""
        if self.x.dtype == torch.float32:
            return float(self.x.norm(dim=-1).mean())
        return float(torch.cat([part.x.norm(dim=-1).flatten() for part in self.parts()]).mean())


@torch.no_grad()
def streams(base: Base, config: Layered, data: Dataset) -> dict[int, Stream]:
    """Record a data set at every candidate layer in one forward, which stops at the last of them."""
    sites = {layer: [clip.site(config.hook, layer), clip.site("block", layer)] for layer in config.layers}
    label, other = [], []
    wanted = list(dict.fromkeys(s for layer in sorted(sites) for s in sites[layer]))
    whole: dict[str, Tensor] = {}
    at = 0
    for batch in data.batches(32):
        pixels = base.processor.image(batch.image).to(base.device, base.model.visual.proj.dtype)
        got = upto(base.model, wanted, image=pixels)
        if not whole:
            shape = (len(data), *got[wanted[0]].shape[1:])
            room.check(len(wanted), shape, base.device)
            whole = {name: room.taken(shape, base.device) for name in wanted}
        for name, x in got.items():
            whole[name][at : at + len(x)] = x.to(whole[name].device)
        at += len(batch.label)
        label.append(batch.label)
        other.append(other_of(config, data, batch))
    about = torch.cat(label), torch.cat(other)
    return {layer: Stream(whole[site], whole[block], *about, base.device) for layer, (site, block) in sites.items()}


def finish(base: Base, layer: int, part: Stream, x: Tensor, by: LabelSet) -> Tensor:
    """Run the rest of the model on activations `x` in place of the recorded ones: logits (n, C)."""
    y = rest(base, x if part.x is part.z else part.z + (x - part.x), layer)
    return by.logits(nnf.normalize(y, dim=1), clip.logit_scale(base))


@torch.no_grad()
def answers(base: Base, layer: int, stream: Stream, by: LabelSet, change: Callable[[Tensor], Tensor]) -> Answers:
    """Classify a data set with its recorded activations changed by `change`, (n, T, D) -> (n, T, D)."""
    logits = torch.cat([finish(base, layer, part, change(part.x), by) for part in stream.parts()])
    return Answers(logits.cpu(), stream.label.cpu(), stream.other.cpu())


def applied(patch: FeatureEdit) -> Callable[[Tensor], Tensor]:
    """Return a patch's edit of its site as a plain function (n, T, D) -> (n, T, D), for use outside of a forward."""
    (act,) = patch.edits()
    assert isinstance(act, Act)
    fn, nothing = act.fn, Inputs({})
    return lambda x: fn(x, nothing)
