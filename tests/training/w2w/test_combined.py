"""Late and combined edits, and sprites as pictures out of distribution: a drawn truth, no trained model."""

from types import SimpleNamespace

import pytest
import torch

from patches.families.diffusion import small
from patches.mechanisms.subspace import linear_layers, size, start
from training.lab.faces import ATTRIBUTES, BINARY
from training.w2w import combined, measure, sprites
from training.w2w.draw import draw


def test_a_late_edit_is_the_unedited_person_above_its_level():
    pipe = small.faces().model
    layers = linear_layers(pipe, ("to_v", "to_out"), under="denoiser")
    g = torch.Generator().manual_seed(0)
    one, other = (start(layers) + 0.3 * torch.randn(2, size(layers), generator=g) for _ in range(2))
    text = pipe.embed(torch.tensor([[1] + [0] * 7]).expand(2, -1))
    noise = torch.randn(2, *pipe.shape, generator=g)

    def show(theta, **late):
        return draw(pipe, layers, 1.0, theta, text, noise, guidance=2.0, steps=4, **late)

    first, edited = show(one), show(other)
    assert torch.equal(show(other, early=one, after=1000), edited)
    assert torch.equal(show(other, early=one, after=0), first)
    between = show(other, early=one, after=600)
    assert not torch.allclose(between, edited)
    assert not torch.allclose(between, first)
    assert torch.equal(show(other, early=other, after=600), edited)


class Drawn:
    """A lab whose pictures are their own attributes: theta (n, 9) in [0, 1] is what the judge reads."""

    def __init__(self, n=40):
        g = torch.Generator().manual_seed(0)
        self.labels = torch.zeros(n, len(ATTRIBUTES))
        self.labels[:, : len(BINARY)] = (torch.rand(n, len(BINARY), generator=g) < 0.5).float()
        self.theta = self.labels.clone()
        self.space = SimpleNamespace(config=SimpleNamespace(attributes=ATTRIBUTES))
        self.judge = SimpleNamespace(read=lambda image: image[:, :, 0, 0])

    def draw(self, theta, pictures, seed, early=None, after=1000):
        shown = theta if early is None or after >= 500 else early
        return shown.repeat_interleave(pictures, 0)[:, :, None, None]


def moved(space, theta, i, sign, strength, random=None):
    """Attribute i reversed whole; along a random direction nothing moves."""
    out = theta.clone()
    if random is None:
        out[:, i] += sign
    return out


def test_edits_that_do_not_meet_add_up_and_late_ones_are_told_by_level(monkeypatch):
    lab = Drawn()
    monkeypatch.setattr(combined, "edited", moved)
    got = combined.composed(lab, 2.0)
    assert got["both"].value == got["alone"].value == 1.0
    assert got["random"].value == 0.0
    assert got["both"].n == 40
    late = combined.delayed(lab, 2.0, (1000, 100))
    assert late["after 1000"]["flip"].value == 1.0
    assert late["after 1000"]["other_flip"].value == 0.0
    assert late["after 100"]["flip"].value == 0.0
    assert measure.over_people(torch.tensor([1.0, float("nan")])).n == 1


def test_sprites_of_people_are_read_against_their_names():
    given = sprites.sprites()
    assert given.image.shape == (len(given.told), 3, 64, 64)
    assert 0 <= float(given.image.min()) < float(given.image.max()) <= 1
    told = dict(zip(sprites.NAMED, given.told.sum(0).tolist(), strict=True))
    assert min(told.values()) >= 8
    assert not bool((given.told[:, 1] & given.told[:, 2]).any())
    said = torch.full((len(given.told), len(ATTRIBUTES)), 0.5)
    assert sprites.agreement(said, given.told)["mean"].value == pytest.approx(0.5)
    for i, name in enumerate(sprites.NAMED):
        said[:, BINARY.index(name)] = given.told[:, i].float()
    sure = sprites.agreement(said, given.told)
    assert sure["beard"].value == sure["mean"].value == sure["mean"].low == 1.0
