"""People of the lab's sprites as pictures out of distribution: what an inversion keeps of what their names say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from registry.measure import Measure
from training.lab import atlas
from training.lab.faces import BINARY
from training.w2w.directions import auc

GROUND = 0.8
"""grey that sprites are shown on"""
NAMED = ("beard", "bald", "long_hair")
"""attributes that a name tells: `man beard`, `woman bald`; of women who are not bald, that their hair is long"""


@dataclass(frozen=True)
class Sprites:
    """n sprites of grown people, every style once."""

    image: Tensor
    """(n, 3, 64, 64) in [0, 1]"""
    told: Tensor
    """(n, 3) bool: which of NAMED the name says"""


def sprites() -> Sprites:
    """The portraits of the atlas: no roles, no children, no skin tones."""
    lab = atlas.load()
    found = {name: p for name in lab.names if (p := atlas.person(name)) and not p.does and p.gender}
    grown = [name for name, p in found.items() if p.age != "child" and name not in ("boy", "girl")]
    at = lab.pick([lab.find(name) for name in grown], lab.styles)
    names = [lab.names[int(lab.concept[i])] for i in at]
    told = torch.tensor(
        [
            [found[n].beard, found[n].hair == "bald", found[n].gender == "woman" and found[n].hair != "bald"]
            for n in names
        ]
    )
    x = lab.sprites[at].float() / 255
    return Sprites(x[:, :3] * x[:, 3:] + GROUND * (1 - x[:, 3:]), told)


def agreement(said: Tensor, told: Tensor, draws: int = 400) -> dict[str, Measure]:
    """AUC of what the judge reads (n, 9) against what names say (n, 3), each attribute and their mean; bootstrap over
    sprites."""
    columns = [BINARY.index(name) for name in NAMED]
    g = Generator().manual_seed(0)
    picks = [torch.arange(len(said)), *torch.randint(len(said), (draws, len(said)), generator=g)]
    each = torch.tensor([[auc(said[k, c], told[k, i]) for i, c in enumerate(columns)] for k in picks])
    table = torch.cat([each, each.nanmean(1, keepdim=True)], 1)
    ends = torch.tensor([0.025, 0.975])
    out = {}
    for name, values in zip((*NAMED, "mean"), table.T, strict=True):
        low, high = values[1:].nanquantile(ends).tolist()
        out[name] = Measure(float(values[0]), low, high, len(said), "higher")
    return out
