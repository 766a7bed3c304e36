"""CHAIR and POPE: how much of what a caption names is there, and how questions of presence are answered.

CHAIR (Rohrbach et al., arXiv 1809.02156): CHAIR_i = invented mentions / mentions, CHAIR_s = captions with an invented
mention / captions; beside them recall, named objects that are there / objects that are there. POPE (Li et al., arXiv
2305.10355): balanced "is there a X ?" whose absent X is random, popular in the data, or what usually comes with what
is there (adversarial).

Intervals are percentile bootstraps over pictures (mentions of one caption are not independent), 95 %.
Shapes: N pictures, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from registry.measure import Better, Measure


def ratio(over: Tensor, under: Tensor, better: Better = "", draws: int = 1000) -> Measure:
    """Sum of over (N,) by sum of under (N,), with a bootstrap interval over the N pictures; n is the lower sum."""
    g = torch.Generator().manual_seed(0)
    a, b = over.double(), under.double()
    if not len(a) or not float(b.sum()):
        return Measure(0.0, n=0, better=better)
    rows = torch.randint(len(a), (draws, len(a)), generator=g)
    many = (a[rows].sum(1) / b[rows].sum(1).clamp(min=1e-9)).sort().values
    low, high = float(many[int(0.025 * draws)]), float(many[int(0.975 * draws) - 1])
    return Measure(float(a.sum() / b.sum()), low, high, int(b.sum()), better)


def chair(said: Tensor, there: Tensor, partner: Tensor | None = None) -> dict[str, Measure]:
    """said, there (N, C) bool; partner (N,) class that usually comes along and is absent, -1 none."""
    wrong, right, one = said & ~there, said & there, torch.ones(len(said))
    out = {
        "chair_i": ratio(wrong.sum(1), said.sum(1), "lower"),
        "chair_s": ratio(wrong.any(1), one, "lower"),
        "recall": ratio(right.sum(1), there.sum(1), "higher"),
        "precision": ratio(right.sum(1), said.sum(1), "higher"),
        "mentions": ratio(said.sum(1), one),
    }
    two = there.sum(1) == 2
    if bool(two.any()):
        out["recall of two"] = ratio(right[two].sum(1), there[two].sum(1), "higher")
    if partner is not None and bool((partner >= 0).any()):
        rows = (partner >= 0).nonzero()[:, 0]
        out["partner"] = ratio(wrong[rows, partner[rows]], torch.ones(len(rows)), "lower")
    return out


@dataclass(frozen=True)
class Questions:
    """Balanced questions of presence."""

    picture: Tensor
    """(Q,) row of the data"""
    ask: Tensor
    """(Q,) class asked for"""
    yes: Tensor
    """(Q,) bool: it is there"""


POPE = ("random", "popular", "adversarial")


def pope(there: Tensor, partner: Tensor, kind: str, g: Generator) -> Questions:
    """One question for a thing that is there and one for a thing that is not, per picture.

    partner (N,): the adversarial choice where it is >= 0 and absent; else, and for COCO, the absent class that most
    often comes with what is there.
    """
    n, c = there.shape
    often = there.float().mean(0)
    together = there.float().T @ there.float()
    pick: list[int] = []
    for i in range(n):
        absent = (~there[i]).nonzero()[:, 0]
        if kind == "random":
            pick.append(int(absent[int(torch.randint(len(absent), (), generator=g))]))
        elif kind == "popular":
            best = often[absent].argsort(descending=True)[: max(1, c // 8)]
            pick.append(int(absent[best[int(torch.randint(len(best), (), generator=g))]]))
        elif int(partner[i]) >= 0 and not bool(there[i, partner[i]]):
            pick.append(int(partner[i]))
        else:
            pick.append(int(absent[together[there[i]].sum(0)[absent].argmax()]))
    here = [int(x[int(torch.randint(len(x), (), generator=g))]) for row in there if len(x := row.nonzero()[:, 0])]
    full = there.any(1).nonzero()[:, 0]
    picture = torch.cat([full, torch.arange(n)])
    ask = torch.tensor([*here, *pick])
    return Questions(picture, ask, torch.arange(len(ask)) < len(here))


def answers(says_yes: Tensor, questions: Questions) -> dict[str, Measure]:
    """accuracy, F1's parts and the share of yes of (Q,) answers."""
    one, yes = torch.ones(len(says_yes)), questions.yes
    return {
        "accuracy": ratio(says_yes == yes, one, "higher"),
        "yes": ratio(says_yes, one),
        "recall": ratio(says_yes & yes, yes, "higher"),
        "false_yes": ratio(says_yes & ~yes, ~yes, "lower"),
    }


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive has the higher score; ties count half. 0.5 if one side is empty."""
    if not len(positive) or not len(negative):
        return 0.5
    x = torch.cat([positive, negative]).double()
    _, which, count = x.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[which]
    p, m = len(positive), len(negative)
    return float((rank[:p].sum() - p * (p + 1) / 2) / (p * m))


def area(score: Tensor, positive: Tensor, draws: int = 300) -> Measure:
    """AUROC of score (M,) for positive (M,) bool, bootstrapped over the M mentions; 0.5 of n = 0 without any."""
    if not len(score):
        return Measure(0.5, n=0, better="higher")
    g = torch.Generator().manual_seed(0)
    many = []
    for _ in range(draws):
        rows = torch.randint(len(score), (len(score),), generator=g)
        s, p = score[rows], positive[rows]
        many.append(auroc(s[p], s[~p]))
    many.sort()
    value = auroc(score[positive], score[~positive])
    return Measure(value, many[int(0.025 * draws)], many[int(0.975 * draws) - 1], len(score), "higher")


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Area under precision and recall of score (M,) for positive (M,) bool, as scikit-learn's step sum."""
    order = score.argsort(descending=True)
    hit = positive[order].double()
    if not float(hit.sum()):
        return 0.0
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return float((precision * hit).sum() / hit.sum())
