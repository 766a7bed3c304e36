"""Caption metrics from their published definitions, and object precision and recall against ground truth.

BLEU (Papineni et al. 2002), CIDEr-D (Vedantam et al. 2015), CLIPScore (Hessel et al. 2021).

Texts are compared as lower-case words without punctuation, as the usual tokeniser for these metrics leaves them. METEOR
and SPICE need WordNet and parsers, so they are not implemented.
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
"""Standard deviation, in words, of CIDEr-D's Gaussian length penalty"""


def words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    """Count every n-gram of a text."""
    w = words(text)
    return Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], n: int = MAX_N) -> float:
    """Compute corpus BLEU-n in [0, 1], unsmoothed.

    The geometric mean of the clipped n-gram precisions of the whole corpus, times the brevity penalty exp(1 - r/c) with
    the closest reference lengths (the shorter of two equally close).
    """
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
    """Compute the CIDEr-D score of each candidate: 10 / 4 times the sum over n = 1..4 of the mean over its references
    of

            exp(-(l_c - l_r)^2 / (2 SIGMA^2)) * min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)

    g_n are tf-idf vectors of n-grams: counts times log(N / df), with df the number of the N items that have the n-gram
    in a reference. Document frequencies come from the references given, so scores of different sets do not compare.
    """
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
    """Compute CLIPScore (n,), 2.5 max(cos, 0), of unit image and text features (n, k)."""
    return 2.5 * (images * texts).sum(-1).clamp_min(0)


@dataclass(frozen=True)
class Objects:
    """Precision, recall and F1 of the object names in a caption, and the names it mentions."""

    precision: float
    recall: float
    f1: float
    said: frozenset[str]
    """Names that the caption mentions"""


def named(text: str, names: Iterable[str]) -> frozenset[str]:
    """Return the names that a text contains as whole words, longest first, so that "horse face" is not a "horse"."""
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
    """Score a caption's object names against the objects present.

    names: vocabulary of objects; a caption without any gets 0.
    """
    said, true = named(text, names), frozenset(" ".join(words(t)) for t in there)
    hit = len(said & true)
    p, r = hit / len(said) if said else 0.0, hit / len(true) if true else 0.0
    return Objects(p, r, 2 * hit / (len(said) + len(true)) if said or true else 0.0, said)


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references) or not all(references):
        raise Invalid("Captions are compared with references: as many lists of them as captions, none of them empty.")
