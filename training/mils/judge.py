"""A judge that had no part in any search: a small network of its own, trained on the lab's train scenes in a minute.

    python -m training.mils.judge out.safetensors

It shares nothing with lab:clip: no weight, no tokenizer, no training picture (its scenes are drawn in the train styles,
smaller, and it knows nothing but the 100 classes and the nine grounds). A convolutional tower embeds the picture; a
text is the mean of the embeddings of the names it says. Trained by the contrastive loss over captions of its batch,
so the cosine of a picture and a text is a CLIPScore by other eyes: 2.5 max(cos, 0).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.lab import atlas, worlds
from training.lab.renderer import GROUNDS, SIZE, Layout, choose, generator, grounds, render, things
from training.tasks.captions import clip_score, named

SHIPPED = Path(__file__).parent.parent / "lab" / "mils-judge.safetensors"
SIDE = 48
"""pixels; the judge sees pictures at half their size"""
WIDTH = 96


@cache
def names() -> tuple[str, ...]:
    """What the judge knows: classes, then grounds."""
    return (*worlds.imagenet_classes(), *GROUNDS)


class Judge(nn.Module):
    """Pictures and sets of names in one space."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 24, 48, 96, 128)
        self.tower = nn.Sequential(*(
            layer for a, b in itertools.pairwise(sizes)
            for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU())
        ))  # fmt: skip
        self.out = nn.Linear(sizes[-1] * 2, WIDTH)
        self.words = nn.Embedding(len(names()), WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def images(self, x: Tensor) -> Tensor:
        """(n, WIDTH) of unit norm of uint8 pictures (n, 3, H, W)."""
        x = F.interpolate(x.float() / 127.5 - 1, (SIDE, SIDE), mode="area")
        y = self.tower(x).flatten(2)
        return F.normalize(self.out(torch.cat([y.mean(-1), y.amax(-1)], 1)), dim=-1)

    def sets(self, many_hot: Tensor) -> Tensor:
        """(n, WIDTH) of unit norm, of sets of names (n, names) as 0 and 1."""
        return F.normalize(many_hot @ self.words.weight, dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """The same of texts, by the names they say; zero for a text that says none."""
        hot = torch.zeros(len(texts), len(names()))
        for row, text in zip(hot, texts, strict=True):
            for name in named(text, names()):
                row[names().index(name)] = 1.0
        return self.sets(hot) * (hot.sum(1, keepdim=True) > 0)

    @torch.inference_mode()
    def score(self, images: Tensor, texts: Sequence[str]) -> list[float]:
        """CLIPScore of every picture and its text."""
        made: list[float] = clip_score(self.images(images), self.texts(texts)).tolist()
        return made


def train(steps: int = 500, batch: int = 64, seed: int = 0) -> Judge:
    """A judge from nothing."""
    lab, classes = atlas.load(), worlds.imagenet_classes()
    ids = torch.tensor([lab.find(c) for c in classes])
    where = {int(c): i for i, c in enumerate(ids)}
    pool = lab.pick(ids.tolist(), worlds.STYLES["train"] + worlds.STYLES["val"])
    torch.manual_seed(seed)
    judge = Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        g = generator("mils/judge", seed, step)
        sprite = choose(pool, (batch, 2), g)
        sprite[torch.rand(batch, generator=g) < 0.4, 1] = -1
        scene = render(Layout(grounds(batch, g, textures=(0, 28)), things(sprite, g)))
        hot = torch.zeros(batch, len(names()))
        for k in range(2):
            for row, concept in enumerate(scene.concept[:, k].tolist()):
                if concept >= 0:
                    hot[row, where[concept]] = 1.0
        hot[torch.arange(batch), len(classes) + scene.ground] = (torch.rand(batch, generator=g) < 0.6).float()
        logits = judge.scale.exp() * judge.images(scene.image) @ judge.sets(hot).T
        at = torch.arange(batch)
        loss = (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return judge.eval()


def save(judge: Judge, file: Path) -> None:
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, file)


@cache
def load(file: Path = SHIPPED) -> Judge:
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return judge.eval()


@torch.inference_mode()
def accuracy(judge: Judge, split: str = "test", n: int = 200) -> dict[str, float]:
    """How often a scene's own pair of names beats the other scenes' pairs, and how often one of two is recognised."""
    from training.mils.scenes import scenes

    data = scenes(split, n)
    images = judge.images(data.images)
    own = judge.texts([" and ".join(pair) for pair in data.things])
    single = judge.texts(worlds.imagenet_classes())
    best = (images @ single.T).argmax(1).tolist()
    return {
        "retrieval_top1": float(((images @ own.T).argmax(1) == torch.arange(n)).float().mean()),
        "names_one_of_two": sum(worlds.imagenet_classes()[b] in pair for b, pair in zip(best, data.things, strict=True))
        / n,
    }


if __name__ == "__main__":
    assert SIZE % SIDE == 0
    _judge = train(int(sys.argv[2]) if len(sys.argv) > 2 else 500)
    save(_judge, Path(sys.argv[1]))
    sys.stdout.write(f"{accuracy(_judge)}\n")
