"""The lab's sounds: one or two synthetic events of known kind and pitch, one second, and a small CLAP trained on them.

    python -m training.mils.sounds out/     # trains the CLAP: two minutes of one core; loads as local-dir:out

Every sound is a function of (split, n, seed). Splits share no seed, test has attack times, timbres (partials' weights)
and noise levels of its own range. What a sound is called is known, so exact kinds can be counted as objects are.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patches.families.base import Base
from patches.families.search import sound as claps
from training.lab.renderer import generator

RATE, SECONDS = 8000, 1.0
KINDS = ("bell", "drum", "whistle", "buzzer", "hiss", "siren", "organ", "click", "wobble", "chirp")
PITCHES = ("low", "high")
NAMES = tuple(f"{p} {k}" for k in KINDS for p in PITCHES)
PAIRS = tuple(
    (a, b) for a in range(len(NAMES)) for b in range(a) if a // len(PITCHES) != b // len(PITCHES)
)  # fmt: skip
"""two events of one sound are of two kinds"""
TEST_PAIRS = PAIRS[::4]
"""the pairs of test's sounds; no line of the bank says both"""
_RANGE = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}
"""Part of every nuisance's range that a split draws from"""


@dataclass(frozen=True)
class Sounds:
    """n sounds and what is in them."""

    samples: Tensor
    """(n, RATE * SECONDS) in [-1, 1]"""
    names: tuple[tuple[str, ...], ...]
    """one or two of NAMES, in order of time"""

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(caption(names) for names in self.names)


def caption(names: Sequence[str]) -> str:
    return "a sound of a " + " and a ".join(names)


def sounds(split: str, n: int, seed: int = 0, two: bool | None = None) -> Sounds:
    """n sounds. two: two events, or one; None: half of them have two."""
    g = generator("mils/sounds", split, seed)
    many, names = [], []
    for _ in range(n):
        both = bool(torch.rand((), generator=g) < 0.5) if two is None else two
        a = int(torch.randint(len(NAMES), (), generator=g))
        pairs = TEST_PAIRS if split == "test" else PAIRS
        which = pairs[int(torch.randint(len(pairs), (), generator=g))] if both else (a,)
        if both and torch.rand((), generator=g) < 0.5:
            which = which[::-1]
        length = RATE // 2 if both else RATE
        many.append(torch.cat([event(NAMES[w], length, split, g) for w in which]))
        names.append(tuple(NAMES[w] for w in which))
    x = torch.stack(many)
    level = _drawn(split, (n, 1), g) * 0.02
    return Sounds((x + level * torch.randn(x.shape, generator=g)).clamp(-1, 1), tuple(names))


def _drawn(split: str, shape: tuple[int, ...], g: Generator) -> Tensor:
    low, high = _RANGE[split]
    return low + (high - low) * torch.rand(shape, generator=g)


def event(name: str, length: int, split: str, g: Generator) -> Tensor:
    """(length,) one event. Nuisances: exact pitch, phase, attack, loudness, weights of partials."""
    pitch, _, kind = name.partition(" ")
    a, b, c, d = _drawn(split, (4,), g).tolist()
    f = (220.0 if pitch == "low" else 880.0) * 2 ** ((a - 0.5) * 0.5)
    t = torch.arange(length) / RATE
    phase = 2 * math.pi * (f * t + b)
    decay = torch.exp(-t * (4 + 4 * c))
    noise = torch.randn(length, generator=g)
    if kind == "bell":
        x = (phase.sin() + (0.4 + 0.4 * d) * (2.76 * phase).sin() + 0.3 * (5.4 * phase).sin()) * decay
    elif kind == "drum":
        x = (2 * math.pi * f * 0.4 * (1 - torch.exp(-12 * t)) / 12 * 8).sin() * torch.exp(-t * (12 + 6 * c)) * 1.5
    elif kind == "whistle":
        x = (phase * 1.5 + 2.5 * (2 * math.pi * (5 + 2 * c) * t).sin()).sin()
    elif kind == "buzzer":
        x = phase.sin().sign() * (0.5 + 0.2 * d)
    elif kind == "hiss":
        x = torch.diff(noise, prepend=noise[:1]) * 0.4 if pitch == "high" else noise.cumsum(0) * 0.03
    elif kind == "siren":
        x = (2 * math.pi * f * (t + (0.4 + 0.2 * c) * t * t)).sin()
    elif kind == "organ":
        x = sum((phase * k).sin() / k * (0.6 + 0.4 * d) for k in (1, 2, 3, 4)) * 0.5
    elif kind == "click":
        x = ((t * (8 + 4 * c)) % 1 < 0.04).float() * phase.sin().sign()
    elif kind == "wobble":
        x = phase.sin() * (0.5 + 0.5 * (2 * math.pi * (6 + 4 * c) * t).sin())
    else:  # chirp
        x = (2 * math.pi * f * 2 * (t - (0.35 + 0.1 * c) * t * t)).sin() * (2 * math.pi * 3 * t).sin().abs()
    x = torch.as_tensor(x, dtype=torch.float32)
    rise = min(length, 1 + int(RATE * 0.02 * d))
    x[:rise] *= torch.linspace(0, 1, rise)
    return x / x.abs().max().clamp_min(1e-3) * (0.5 + 0.4 * b)


def bank() -> tuple[str, ...]:
    """Lines about sounds: every name alone, every pair of kinds in both orders that no test sound is, some of three."""
    kept = {frozenset(NAMES[i] for i in pair) for pair in TEST_PAIRS}
    g = generator("mils/sounds", "bank")
    out: dict[str, None] = {}
    for name in NAMES:
        out |= dict.fromkeys(f"{start} {name}" for start in ("a sound of a", "a", "the noise of a"))
    for a in NAMES:
        for b in NAMES:
            if a != b and frozenset((a, b)) not in kept:
                out |= dict.fromkeys(
                    (f"a sound of a {a} and a {b}", f"a {a} and a {b}", f"the noise of a {a} and a {b}")
                )
    while len(out) < 3200:
        three = [NAMES[i] for i in torch.randperm(len(NAMES), generator=g)[:3].tolist()]
        if not any(frozenset(p) in kept for p in itertools.combinations(three, 2)):
            out["a sound of a " + " and a ".join(three)] = None
    return tuple(out)


def train(folder: Path, steps: int = 300, batch: int = 48, seed: int = 0, width: int = 32) -> dict[str, Any]:
    """A small CLAP of these sounds by the contrastive loss, saved in the hub's layout. Returns retrieval accuracy on
    val: how often a single sound's name is first of all NAMES."""
    vocabulary = f"a sound of the noise and {' '.join(NAMES)}".split()
    model, ears = claps.small(vocabulary, rate=RATE, seconds=SECONDS, width=width, seed=seed)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    scale = torch.tensor(math.log(10.0), requires_grad=True)
    optimiser.add_param_group({"params": [scale], "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [2e-3, 1e-2], total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        made = sounds("train", batch, seed=seed * 100_000 + step)
        x = model.get_audio_features(input_features=features(ears, made.samples)).pooler_output
        y = model.get_text_features(**ears.text(made.captions)).pooler_output
        logits = scale.exp() * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
        same = torch.tensor([[p == q for q in made.captions] for p in made.captions]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    claps.save(model, ears, folder)
    right = accuracy(claps.load(f"local-dir:{folder}"), n=min(200, 20 * steps))
    return {"loss": [round(x, 3) for x in losses[::20]], "val_top1": right}


def features(ears: claps.Ears, samples: Tensor) -> Tensor:
    """(n, 1, frames, mels)."""
    made = ears.extractor(list(samples.numpy()), sampling_rate=RATE, return_tensors="pt")
    found: Tensor = made["input_features"]
    return found


@torch.inference_mode()
def accuracy(base: Base, split: str = "val", n: int = 200) -> float:
    """How often the name of a single sound is the best of NAMES."""
    scorer, data = claps.Clap(base), sounds(split, n, two=False)
    texts = [caption([name]) for name in NAMES]
    right = 0
    for samples, names in zip(data.samples, data.names, strict=True):
        scores = scorer(scorer.target({"sound": (samples, RATE)}), texts)
        right += NAMES[scores.index(max(scores))] == names[0]
    return right / n


if __name__ == "__main__":
    _steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    sys.stdout.write(f"{train(Path(sys.argv[1]), _steps)}\n")
