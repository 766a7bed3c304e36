"""The texts that `lab:vlm`'s decoder reads before it ever sees a picture, and what is said of scenes.

    <bos> [4 words: what each tile shows] describe : a mouse and a cheese wedge on sand <eos>
    <bos> [4 words] is there a cactus ? no <eos>
    <bos> [4 words] how many things ? two <eos>

The four words stand for what a large language model does with words in its context. Some things are missing among them
though the text names them (`Noise.omit`), so where things come in company guessing pays: that is the decoder's bias.

Shapes: n texts, T = 4 tiles, L tokens, V words, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from patches.families.vlm.lab import EOS, MARKS, PAD
from training.lab.company import COMPANY, company_classes, company_things
from training.lab.renderer import GROUNDS
from training.lab.worlds import PAIRS

WORDS = (
    "describe", ":", "a", "and", "on", "is", "there", "?", "yes", "no", "how", "many", "things",
    "one", "two", "three", "four",
)  # fmt: skip
VOCABULARY = (*MARKS, *WORDS, *GROUNDS, *company_classes())
ID = {w: i for i, w in enumerate(VOCABULARY)}
GROUND, FIRST = len(MARKS) + len(WORDS), len(MARKS) + len(WORDS) + len(GROUNDS)
"""ids of the first ground and of the first thing"""
C = len(company_classes())
PROMPT = (ID["describe"], ID[":"])
TILES = 4
NUMBERS = tuple(ID[w] for w in ("one", "two", "three", "four"))


@dataclass(frozen=True)
class Noise:
    """How the four words fall short of the text."""

    omit: float = 0.1
    """share of the named things that are on no tile"""
    stray: float = 0.02
    """share of the tiles that show something the text does not name"""
    soft: float = 0.6
    """share of the texts whose words are blurred as a projector's output is: see `blur`"""
    partner: float = 0.0
    """share of a pair's partners that are on no tile though the text names them beside the first; below `omit`: as
    other things"""
    trace: float = 0.0
    """how much of its word such a partner leaves on one tile of a blurred text, at most"""


@dataclass(frozen=True)
class Texts:
    """n texts after their tiles, right padded."""

    tiles: Tensor
    """(n, T) ids"""
    ids: Tensor
    """(n, L) ids"""
    answer: Tensor
    """(n, L) bool: what is learned"""
    ground: Tensor
    """(n,)"""
    partner: Tensor
    """(n,) id of the partner of what is there, if no tile shows it, else -1"""
    named: Tensor
    """(n,) bool: the text names that partner all the same"""


def caption(things: Tensor, ground: int) -> list[int]:
    """Ids after <bos> and tiles: prompt, things in this order, ground, <eos>."""
    words = list(PROMPT)
    for j, w in enumerate(w for w in things.tolist() if w >= 0):
        words += ([ID["and"]] if j else []) + [ID["a"], FIRST + w]
    return [*words, ID["on"], GROUND + ground, EOS]


def pad(texts: list[list[int]], starts: list[int]) -> tuple[Tensor, Tensor]:
    """(n, L) ids, and (n, L) bool from each text's own start to its end."""
    longest = max(map(len, texts))
    ids = torch.tensor([t + [PAD] * (longest - len(t)) for t in texts])
    return ids, (ids != PAD) & (torch.arange(longest) >= torch.tensor(starts)[:, None])


def captions(things: Tensor, ground: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
    """(n, K) things, (n,) grounds -> ids and answers of their captions, things in random order."""
    order = torch.rand(things.shape, generator=g).argsort(1)
    rows = things.gather(1, order)
    return pad([caption(row, where) for row, where in zip(rows, ground.tolist(), strict=True)], [2] * len(things))


def maps(things: Tensor, ground: Tensor, g: Generator, noise: Noise, head: Tensor | None = None) -> Tensor:
    """(n, T) ids: a thing on the tile of its quarter, the ground on the others. head (n,): the pair whose partner is
    missing more often."""
    n = len(things)
    partner = torch.full((n,), -2) if head is None else torch.where(head >= 0, head + len(PAIRS), -2)
    company = max(noise.partner, noise.omit)
    out = (GROUND + ground)[:, None].repeat(1, TILES)
    quarter, rows = torch.rand(n, TILES, generator=g).argsort(1), torch.arange(n)
    for k in range(things.shape[1]):
        omit = torch.where(things[:, k] == partner, company, noise.omit)
        shown = (things[:, k] >= 0) & (torch.rand(n, generator=g) >= omit)
        out[rows, quarter[:, k]] = torch.where(shown, FIRST + things[:, k], out[rows, quarter[:, k]])
    anything = torch.randint(FIRST, FIRST + C, out.shape, generator=g)
    return torch.where(torch.rand(out.shape, generator=g) < noise.stray, anything, out)


def blur(made: Texts, words: Tensor, g: Generator, noise: Noise) -> Tensor:
    """The tiles of n texts, (V, D) words -> (n, T, D). In a share of the texts each word is weaker, the ground shines
    through, a trace of another word is there that is never said (or less than none, as after an erasure), and all is
    noisy. With `noise.trace`, a named partner that no tile shows is faintly there, one that is not named less so."""
    ids, ground, n = made.tiles, made.ground, len(made.tiles)
    x, back = words[ids], words[GROUND + ground][:, None]
    other = words[torch.randint(FIRST, FIRST + C, ids.shape, generator=g)]

    def u(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, TILES, 1, generator=g)

    scale = words.detach().pow(2).mean().sqrt()
    strength = torch.where(ids[:, :, None] >= FIRST, u(0.55, 1.1), u(0.0, 1.1))
    trace = (torch.rand(n, TILES, 1, generator=g) < 0.5).float() * u(-0.6, 0.35)
    if noise.trace:
        at, faint = torch.randint(TILES, (n,), generator=g), torch.rand(n, generator=g)
        much = torch.where(made.named, noise.trace * faint, (noise.trace + 0.6) * faint - 0.6)
        rows = (made.partner >= 0).nonzero()[:, 0]
        other = other.index_put((rows, at[rows]), words[made.partner[rows]])
        trace = trace.index_put((rows, at[rows]), much[rows, None])
    soft = strength * x + u(0, 0.5) * back + trace * other + u(0, 0.5) * scale * torch.randn(x.shape, generator=g)
    return torch.where(torch.rand(n, 1, 1, generator=g) < noise.soft, soft, x)


def texts(n: int, g: Generator, kind: str, noise: Noise, questions: float = 0.0) -> Texts:
    """n texts of scenes of a kind (`company.COMPANY`). questions: share that asks for presence or number."""
    assert kind in COMPANY
    things, head = company_things(n, kind, 0.9, g)
    ground = torch.randint(len(GROUNDS), (n,), generator=g)
    tiles = maps(things, ground, g, noise, head)
    partner = torch.where(head >= 0, head + len(PAIRS) + FIRST, -1)
    partner = torch.where((tiles == partner[:, None]).any(1), -1, partner)
    named = (partner >= 0) & (things + FIRST == partner[:, None]).any(1)
    order = torch.rand(things.shape, generator=g).argsort(1)
    rows = things.gather(1, order)
    u = torch.rand(n, 2, generator=g).tolist()
    other = torch.randint(C, (n,), generator=g).tolist()
    out, starts = [], []
    for i in range(n):
        here = [w for w in rows[i].tolist() if w >= 0]
        if u[i][0] >= questions:
            out.append(caption(rows[i], int(ground[i])))
            starts.append(2)
        elif u[i][0] < questions * 0.75:  # half of the answers are yes; of the rest half ask for company
            ask = here[0] if u[i][1] < 0.5 else other[i]
            if u[i][1] > 0.75 and head[i] >= 0:
                ask = int(head[i]) + len(PAIRS)
            yes = ID["yes"] if ask in here else ID["no"]
            out.append([ID["is"], ID["there"], ID["a"], FIRST + ask, ID["?"], yes, EOS])
            starts.append(5)
        else:
            out.append([ID["how"], ID["many"], ID["things"], ID["?"], NUMBERS[len(here) - 1], EOS])
            starts.append(4)
    ids, answer = pad(out, starts)
    return Texts(tiles, ids, answer, ground, partner, named)
