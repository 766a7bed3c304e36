"""Metrics of captions, written to their published definitions: BLEU (Papineni et al. 2002), CIDEr-D (Vedantam et al.
2015), CLIPScore (Hessel et al. 2021), and exact objects on the lab, where what is in a picture is known.

Texts are compared as lower-case words; punctuation is left out, as the usual tokeniser for these metrics does. METEOR
and SPICE need word nets and parsers that are no part of this project, so there is nothing here under their names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from registry.errors import Invalid

MAX_N = 4
SIGMA = 6.0
"""Width of CIDEr-D's penalty for captions of other lengths"""


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    """How often every run of n words occurs."""
    w = words(text)
    return Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], n: int = MAX_N) -> float:
    """Corpus BLEU-n in [0, 1]: geometric mean of the clipped n-gram precisions of the whole corpus, times the brevity
    penalty exp(1 - r/c) with the closest reference lengths (of two equally close the shorter). No smoothing."""
    _check(candidates, references)
    hits, total = [0] * n, [0] * n
    length = closest = 0
    for candidate, refs in zip(candidates, references, strict=True):
        c = len(words(candidate))
        length += c
        closest += min((abs(len(words(r)) - c), len(words(r))) for r in refs)[1]
        for k in range(1, n + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for r in refs:
                most |= ngrams(r, k)
            mine = ngrams(candidate, k)
            hits[k - 1] += sum(min(count, most[gram]) for gram, count in mine.items())
            total[k - 1] += sum(mine.values())
    if not all(hits) or not length:
        return 0.0
    precision = sum(math.log(h / t) for h, t in zip(hits, total, strict=True)) / n
    return math.exp(min(0.0, 1 - closest / length) + precision)


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every candidate: 10 / 4 times the sum over n = 1..4 of the mean over its references of

        exp(-(l_c - l_r)^2 / (2 SIGMA^2)) * min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)

    g_n are tf-idf vectors of n-grams: counts times log(N / df), df in how many of the N items some reference has it.
    The corpus for df is the references given here, so scores of different sets do not compare."""
    _check(candidates, references)
    N = len(references)
    df: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(MAX_N)]
    for refs in references:
        for n in range(MAX_N):
            df[n].update({gram for r in refs for gram in ngrams(r, n + 1)})

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        counts = ngrams(text, n + 1)
        return {gram: tf * math.log(N / max(1, df[n][gram])) for gram, tf in counts.items()}

    out = []
    for candidate, refs in zip(candidates, references, strict=True):
        score = 0.0
        for n in range(MAX_N):
            c = vector(candidate, n)
            for r in refs:
                g = vector(r, n)
                dot = sum(min(v, g[gram]) * g[gram] for gram, v in c.items() if gram in g)
                norms = math.sqrt(sum(v * v for v in c.values())) * math.sqrt(sum(v * v for v in g.values()))
                off = len(words(candidate)) - len(words(r))
                if norms:
                    score += dot / norms * math.exp(-off * off / (2 * SIGMA**2)) / len(refs)
        out.append(10.0 * score / MAX_N)
    return out


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore 2.5 max(cos, 0) (n,) of unit features (n, k) each."""
    return 2.5 * (images * texts).sum(-1).clamp_min(0)


@dataclass(frozen=True)
class Objects:
    """Which names a caption says, against what is there."""

    precision: float
    recall: float
    f1: float
    said: frozenset[str]


def named(text: str, names: Iterable[str]) -> frozenset[str]:
    """The names that a text says: whole words, longer names first, so that "horse face" is no horse."""
    found, left = set(), f" {' '.join(words(text))} "
    for name in _longest_first(tuple(names)):
        if f" {name} " in left:
            found.add(name)
            left = left.replace(f" {name} ", " | ")
    return frozenset(found)


@lru_cache(8)
def _longest_first(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted((" ".join(words(n)) for n in names), key=lambda n: (-len(n), n)))


def objects(text: str, there: Iterable[str], names: Iterable[str]) -> Objects:
    """Precision, recall and F1 of the names a caption says, of all `names` there are; 0 where it says none."""
    said, true = named(text, names), frozenset(" ".join(words(t)) for t in there)
    hit = len(said & true)
    p, r = hit / len(said) if said else 0.0, hit / len(true) if true else 0.0
    return Objects(p, r, 2 * hit / (len(said) + len(true)) if said or true else 0.0, said)


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references) or not all(references):
        raise Invalid("Captions are compared with references: as many lists of them as captions, none of them empty.")
