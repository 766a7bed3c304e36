"""Name attention heads by the property their texts are about, and measure how good the names are.

Source of the idea and of two metrics: CLIP-InterpreT, arXiv 2409.06579; Concept Consistency Score: arXiv 2503.11103. A
judge decides which property each text is about (`fits`). There are four, and a person can overrule all of them:

| judge | what it judges by |
|---|---|
| `by_keyword` | a taxonomy, property -> phrases, from any JSON file |
| `by_embedding` | a text tower: cosine with the property's phrases, the threshold from shuffled pairs |
| `Model` | a language model behind an OpenAI-compatible endpoint, with examples in its context |
| `spectrum` | second moments of heads: along which property's texts a head separates images |

The first three judge a head's TextSpan texts (`label`), the last one the whole pool. Every metric comes with its null
under shuffled labels. Shapes: N heads, m texts of a head, M texts of a pool, P properties.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from registry.config import STRICT
from registry.errors import ConfigError, Invalid, NotFound, NotReady
from training.tasks.intervals import wilson
from training.tasks.textspan import RANK, HeadMoments, Span, basis

NONE = "none"
"""Label of a head that is about none of the properties"""
DRAWS = 1000
"""Number of shuffles for a null distribution"""
SCORED = 5
"""Number of a head's first texts that the Concept Consistency Score counts, as published"""
Taxonomy = Mapping[str, Sequence[str]]
"""Property -> phrases"""


# ---- judges of texts ---------------------------------------------------------------------------------------------


def read_taxonomy(file: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a taxonomy, property -> phrases, from a JSON object of lists. Raises NotFound or Invalid."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise NotFound(f'There is no taxonomy {path}. Give a JSON file such as {{"colour": ["red", "blue"]}}.')
    try:
        found = json.loads(path.read_text())
        made = {str(k): tuple(str(w) for w in v) for k, v in found.items() if not isinstance(v, str)}
    except (ValueError, AttributeError, TypeError) as e:
        raise Invalid(f"{path.name} is no JSON object of lists of phrases ({e}).") from None
    if len(made) < 2 or len(made) < len(found) or not all(made.values()):
        raise Invalid(f"{path.name} must name at least two properties, each with a list of phrases.")
    return made


def by_keyword(texts: Sequence[str], taxonomy: Taxonomy) -> Tensor:
    """Judge by keyword: (M, P) bool, whether a phrase of each property is in each text, as whole words of any case."""
    patterns = [re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.I) for words in taxonomy.values()]
    return torch.tensor([[bool(p.search(t)) for p in patterns] for t in texts]).view(len(texts), len(patterns))


def by_embedding(
    texts: Sequence[str], taxonomy: Taxonomy, embed: Callable[[Sequence[str]], Tensor], level: float = 0.95
) -> Tensor:
    """Judge by embedding: (M, P) bool, whether a text is nearer to a property's phrases than `level` of shuffled pairs.

    embed: texts -> (n, k) of unit norm; any text tower. The mean over texts is subtracted first.
    """
    T = embed(texts)
    middle = T.mean(0)
    phrases = [embed(list(words)).mean(0) for words in taxonomy.values()]
    P = torch.nn.functional.normalize(torch.stack(phrases) - middle, dim=1)
    cosine = (torch.nn.functional.normalize(T - middle, dim=1) @ P.T).cpu()  # (M, P)
    if cosine.numel() < 20:
        return cosine == cosine.amax(1, keepdim=True)
    g = torch.Generator().manual_seed(0)
    shuffled = torch.stack([column[torch.randperm(len(column), generator=g)] for column in cosine.T], 1)
    own = cosine.amax(1, keepdim=True) == cosine
    return own & (cosine > torch.quantile(shuffled.flatten()[:1_000_000], level))


@dataclass(frozen=True)
class Endpoint:
    """Address of a language model served by OpenAI's chat API. Set by whoever fits, never by a request."""

    __pydantic_config__ = STRICT

    url: str = ""
    """Base URL such as http://127.0.0.1:3000/v1; empty: none"""
    model: str = "auto"
    """Model name in requests"""
    key: str = ""
    """Name of the environment variable that holds the bearer token"""
    timeout_s: float = 60.0
    """Longest wait in seconds for an answer"""


WORDS = 4
"""Largest number of words in a name; a longer answer is a sentence"""


@dataclass(frozen=True)
class Model:
    """Judge that asks a language model behind an OpenAI-compatible endpoint.

    Answers are parsed leniently, so that small models can be asked: a name is one line, a judgement is numbers.
    """

    endpoint: Endpoint
    examples: Sequence[tuple[Sequence[str], str]] = ()
    """Few-shot examples: (texts of a head, the name a person gave it)"""
    transport: Any = field(default=None, compare=False)
    """httpx transport, to reach an application in this process"""

    def name(self, texts: Sequence[str]) -> str:
        """Ask for the property that texts have in common, in one or two words; NONE if the answer is no name.

        Raises NotReady if nothing usable comes back.
        """
        turns = [
            {"role": "system", "content": "Name the one property that the texts have in common. One or two words."}
        ]
        for seen, said in self.examples:
            turns += [{"role": "user", "content": _listed(seen)}, {"role": "assistant", "content": said}]
        answer = self._ask([*turns, {"role": "user", "content": _listed(texts)}])
        lines = [x for line in answer.splitlines() if (x := normalised(line))]
        if not lines:
            raise NotReady(f"{self.endpoint.url} named no property; it said {answer[:60]!r}.")
        return lines[0][:40].strip() if len(lines[0].split()) <= WORDS else NONE

    def fits(self, texts: Sequence[str], properties: Sequence[str]) -> Tensor:
        """Ask for each property which texts are about it: (M, P) bool. Numbers that are not in the list are ignored."""
        out = torch.zeros(len(texts), len(properties), dtype=torch.bool)
        ask = "Which of these texts are about the property? Answer with their numbers, or with none."
        for i, name in enumerate(properties):
            answer = self._ask(
                [
                    {"role": "system", "content": ask},
                    {"role": "user", "content": f"property: colour\n{_listed(['a red car', 'a dog'])}"},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": f"property: {name}\n{_listed(texts)}"},
                ]
            )
            for n in map(int, re.findall(r"\b\d{1,4}\b", answer)):
                if 1 <= n <= len(texts):
                    out[n - 1, i] = True
        return out

    def _ask(self, messages: list[dict[str, str]]) -> str:
        import httpx

        e = self.endpoint
        if not e.url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint.url={e.url[:80]!r} must begin with http:// or https://.")
        if e.key and e.key not in os.environ:
            raise ConfigError(f"endpoint.key names the environment variable {e.key}, which is not set.")
        headers = {"authorization": f"Bearer {os.environ[e.key]}"} if e.key else {}
        body = {"model": e.model, "messages": messages, "temperature": 0, "max_tokens": 64}
        try:
            with httpx.Client(transport=self.transport, timeout=e.timeout_s) as client:
                answer = client.post(f"{e.url.rstrip('/')}/chat/completions", json=body, headers=headers)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["message"]["content"] or "")
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as problem:
            raise NotReady(
                f"The language model at {e.url} did not answer ({type(problem).__name__}: {problem})."
            ) from None


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"{i}. {t}" for i, t in enumerate(texts, 1))


def normalised(label: str) -> str:
    """Normalise a label for comparison: lower case, no punctuation, no plural s."""
    plain = re.sub(r"[^a-z0-9]+", " ", label.lower()).strip()
    return re.sub(r"(?<=[^s\s]{2})s\b", "", plain)


# ---- labels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """Name of a head, the judge that gave it, and its significance."""

    layer: int
    head: int
    label: str
    source: str
    """Judge: keyword, embedding, model, spectrum or human"""
    score: float
    """Standard deviations above chance; 0 for a person's label"""
    p: float
    """Fraction of shuffles that score as high; 1 where there is no null"""


def label(
    spans: Sequence[Span], fits: Tensor, properties: Sequence[str], source: str, least: float = 2.0
) -> list[Named]:
    """Name each head by the property its texts are about more often than the pool's; NONE below `least` deviations.

    fits: (M, P) over the pool. A text is weighted by the fraction of the head's variance it adds.
    """
    rate = fits.float().mean(0)
    out = []
    for s in spans:
        if not s.texts:
            out.append(Named(s.layer, s.head, NONE, source, 0.0, 1.0))
            continue
        w = torch.tensor(s.share) / sum(s.share)
        got = w @ fits[list(s.texts)].float()
        spread = (rate * (1 - rate) * w.square().sum()).sqrt().clamp_min(1e-6)
        z = torch.where(rate > 0, (got - rate) / spread, torch.zeros(()))
        best = int(z.argmax())
        sure = float(z[best])
        out.append(Named(s.layer, s.head, properties[best] if sure >= least else NONE, source, sure, _tail(sure)))
    return out


def _tail(z: float) -> float:
    return float(0.5 * torch.erfc(torch.tensor(z / 2**0.5)))


@torch.no_grad()
def spectrum(seen: HeadMoments, pool: Tensor, fits: Tensor, rank: int = RANK) -> Tensor:
    """Compute (..., L, H, P) the log of how far apart a head places the texts of a property, for fits (..., M, P) bool.

    It is the variance of a head's contributions along differences between texts of one property, relative to how far
    apart these texts are: v_p = mean_t (t - t_p) Z (t - t_p)^T / mean_t |t - t_p|^2. What a head adds to all texts of a
    property alike does not count: a head is characterised by what it distinguishes. Many assignments `fits` cost little
    more than one, since v_p needs <t, Z t> per text and <t_p, Z t_p> per property. Raises Invalid if a property has one
    text.
    """
    n = fits.sum(-2, keepdim=True)  # (..., 1, P)
    if int(n.min()) < 2:
        raise Invalid("Every property needs at least two texts of the pool, or nothing lies between them.")
    T = pool.double().to(seen.square)
    share = (fits / n).mT.to(T)  # (..., P, M): a product with it averages over the texts of each property
    apart = share @ T.square().sum(1) - (share @ T).square().sum(-1)
    out = []
    for place in range(len(seen.layers)):
        for h in range(seen.sum.shape[1]):
            B = basis(seen.square[place, h], rank)
            values, vectors = torch.linalg.eigh(B @ seen.covariance(place, h) @ B.T)
            R = T @ (B.T @ (vectors * values.clamp_min(0).sqrt()))  # (M, r): |R_t|^2 = <t, Z t>
            v = share @ R.square().sum(1) - (share @ R).square().sum(-1)
            out.append((v / apart).clamp_min(1e-300).log())
    each = torch.stack(out, -2)  # (..., L H, P)
    return each.reshape(*each.shape[:-2], len(seen.layers), -1, each.shape[-1]).float().cpu()


def by_spectrum(
    seen: HeadMoments, pool: Tensor, fits: Tensor, properties: Sequence[str], draws: int = 200, least: float = 0.05,
    seed: int = 0,
) -> tuple[list[Named], Tensor, Tensor]:  # fmt: skip
    """Label heads by `spectrum`; also return the scores (L, H, P) and their p values.

    A head's label is the property that it separates more than other heads do: the largest logarithm, less the head's
    own mean over properties and the property's median over heads. Null: texts are assigned to properties at random, as
    many to each, `draws` times; p is the tail of a normal distribution of that spread, times the number of properties.
    Properties with p above `least` do not count; a head without any is NONE.
    """
    g = torch.Generator().manual_seed(seed)
    value = _against(spectrum(seen, pool, fits))  # (L, H, P)
    square, size = torch.zeros_like(value), 20
    for _ in range(-(-draws // size)):
        some = torch.stack([fits[torch.randperm(len(fits), generator=g)] for _ in range(size)])
        null = _against(spectrum(seen, pool, some))
        square += (null - null.mean(0)).square().sum(0) / (size - 1)
    spread = (square / -(-draws // size)).sqrt().clamp_min(1e-6)
    p = (0.5 * torch.erfc(value / spread / 2**0.5) * len(properties)).clamp_max(1.0)
    out = []
    for place, layer in enumerate(seen.layers):
        for h in range(value.shape[1]):
            sure = torch.where(p[place, h] <= least, value[place, h], -torch.inf)
            best = int((sure if bool(sure.isfinite().any()) else value[place, h]).argmax())
            at = place, h, best
            name = properties[best] if float(p[at]) <= least else NONE
            out.append(Named(layer, h, name, "spectrum", float(value[at]), float(p[at])))
    return out, value, p


def _against(v: Tensor) -> Tensor:
    """Centre logarithms (..., L, H, P): subtract heads' means over properties, then properties' medians over heads."""
    v = v - v.mean(-1, keepdim=True)
    return v - v.flatten(-3, -2).median(-2).values[..., None, None, :]


@dataclass(frozen=True)
class Change:
    """A label that a person overruled."""

    __pydantic_config__ = STRICT

    layer: int
    head: int
    label: str
    who: str
    why: str
    at: str
    """Time of the change, ISO 8601"""


def read_changes(file: str | Path) -> list[Change]:
    """Read changes, oldest first, from a JSON list. Raises NotFound or Invalid."""
    from registry import config as configs

    path = Path(file).expanduser()
    if not path.is_file():
        raise NotFound(f"There is no file of changed labels {path}.")
    try:
        rows = json.loads(path.read_text())
        return [configs.parse(Change, row) for row in rows]
    except (ValueError, TypeError) as e:
        raise Invalid(f"{path.name} must be a JSON list of layer, head, label, who, why, at ({e}).") from None


def override(named: Sequence[Named], changes: Sequence[Change]) -> tuple[list[Named], list[dict[str, Any]]]:
    """Apply a person's changes to labels.

    Returns all labels, and the changes with the labels they replaced. Raises NotFound for an unknown head, Invalid for
    a change without label, who or why.
    """
    now = {(n.layer, n.head): n for n in named}
    trail = []
    for c in changes:
        at = c.layer, c.head
        if at not in now:
            raise NotFound(f"There is no labelled head {at}; layers are {sorted({n.layer for n in named})}.")
        if not (c.label.strip() and c.who.strip() and c.why.strip()):
            raise Invalid(f"The change of head {at} must say label, who and why.")
        trail.append({**vars(c), "was": now[at].label, "by": now[at].source})
        now[at] = Named(c.layer, c.head, c.label.strip(), "human", 0.0, 1.0)
    return [now[n.layer, n.head] for n in named], trail


# ---- how good the names are --------------------------------------------------------------------------------------


def _share(k: int, n: int) -> list[float]:
    """Return [proportion, low, high, n] of k out of n, with a 95 % Wilson interval."""
    return wilson(torch.arange(n) < k) if n else [0.0, 0.0, 1.0, 0]


def sharing(labels: Sequence[str], null: Sequence[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure how labels are distributed over heads.

    Returns the fractions of heads whose label no other head has, or another has, and the largest label's fraction.

    The published "entanglement" is described as the second and equals the first (docs/log/clip_heads.md), so both are
    reported. null: labels to draw from with replacement (default: these), for the chance level.
    """
    mine = [normalised(x) for x in labels]
    n, count = len(mine), Counter(mine)
    unique = sum(count[x] == 1 for x in mine)
    pool = [normalised(x) for x in (null if null is not None else labels)]
    g = torch.Generator().manual_seed(seed)
    drawn = []
    for row in torch.randint(len(pool), (DRAWS, n), generator=g).tolist():
        c = Counter(pool[i] for i in row)
        drawn.append(sum(v for v in c.values() if v == 1) / n)
    return {
        "unique": _share(unique, n),
        "shared": _share(n - unique, n),
        "largest": [count.most_common(1)[0][0], round(count.most_common(1)[0][1] / n, 4)],
        "unique_null": _range(drawn),
    }


def consistency(
    named: Sequence[Named], spans: Sequence[Span], fits: Tensor, properties: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Measure how many of a head's first texts are about its label. Heads without a name are left out.

    association: fraction of heads most of whose texts fit; texts: fraction of texts that fit; ccs: head -> how many of
    `SCORED` fit (Concept Consistency Score), ccs_at: fraction of heads by score; ccr: different labels per head of full
    score. Nulls: labels shuffled over heads; p: fraction of shuffles that are as good.
    """
    by = {(s.layer, s.head): s for s in spans}
    rows = [(n, by[n.layer, n.head]) for n in named if n.label in properties and by[n.layer, n.head].texts]
    if not rows:
        return {"heads": 0}
    at = torch.tensor([properties.index(n.label) for n, _ in rows])
    table = torch.zeros(len(rows), len(properties))  # number of a head's texts that fit each property
    sizes = torch.tensor([min(SCORED, len(s.texts)) for _, s in rows]).float()
    for i, (_, s) in enumerate(rows):
        table[i] = fits[list(s.texts[:SCORED])].float().sum(0)
    index = torch.arange(len(rows))

    def measured(which: Tensor) -> tuple[float, float]:
        hit = table[index, which]
        return float((hit > sizes / 2).float().mean()), float(hit.sum() / sizes.sum())

    g = torch.Generator().manual_seed(seed)
    null = [measured(at[torch.randperm(len(at), generator=g)]) for _ in range(DRAWS)]
    most, texts = measured(at)
    score = table[index, at].int().tolist()
    full = [n.label for (n, _), k in zip(rows, score, strict=True) if k == SCORED]
    p = [(1 + sum(x[i] >= v for x in null)) / (1 + DRAWS) for i, v in enumerate((most, texts))]
    return {
        "heads": len(rows),
        "association": _share(round(most * len(rows)), len(rows)),
        "association_null": _range([x[0] for x in null]),
        "association_p": p[0],
        "texts": _share(round(texts * float(sizes.sum())), int(sizes.sum())),
        "texts_null": _range([x[1] for x in null]),
        "texts_p": p[1],
        "ccs": {f"{n.layer}.{n.head}": k for (n, _), k in zip(rows, score, strict=True)},
        "ccs_at": {str(k): round(score.count(k) / len(score), 4) for k in range(SCORED + 1)},
        "ccr": round(len(set(full)) / len(full), 4) if full else 0.0,
    }


def kappa(one: Sequence[str], two: Sequence[str]) -> float:
    """Compute Cohen's kappa of two judges' labels of the same heads; 0 is chance agreement."""
    n = len(one)
    same = sum(a == b for a, b in zip(one, two, strict=True)) / n
    a, b = Counter(one), Counter(two)
    chance = sum(a[x] * b[x] for x in a) / n**2
    return round((same - chance) / (1 - chance), 4) if chance < 1 else 1.0


def _range(values: Sequence[float]) -> list[float]:
    """Return mean, 2.5 % and 97.5 % quantile."""
    x = torch.tensor(values)
    low, high = torch.quantile(x, torch.tensor([0.025, 0.975])).tolist()
    return [round(v, 4) for v in (float(x.mean()), low, high)]


# ---- labels that were published ----------------------------------------------------------------------------------


def published(file: str | Path) -> dict[str, dict[tuple[int, int], str]]:
    """Parse the labels published in CLIP-InterpreT's src/topic_seg_labels.py, without running it.

    Returns model -> (layer, head) -> label.

    Labels are strings "L9.H10 (Art)"; a missing comma between two of them does no harm.
    """
    path = Path(file)
    if not path.is_file():
        raise NotFound(f"There is no {path}. Get src/topic_seg_labels.py of CLIP-InterpreT.")
    out: dict[str, dict[tuple[int, int], str]] = {}
    model = ""
    for line in path.read_text().splitlines():
        if found := re.match(r"\s*def get_(\w+?)_layer\d+_head", line):
            model = found[1]
        for layer, head, name in re.findall(r"L(\d+)\.H(\d+) \(([^()]*)\)", line):
            out.setdefault(model, {})[int(layer), int(head)] = name
    if not out:
        raise Invalid(f"{path.name} has no labels such as L9.H10 (Art).")
    return out


def published_metrics(file: str | Path) -> dict[str, dict[str, Any]]:
    """Compute `sharing` for each published model; the null draws from the labels of all of them."""
    models = published(file)
    everything = [x for labels in models.values() for x in labels.values()]
    return {
        name: {"heads": len(labels), **sharing(list(labels.values()), everything)} for name, labels in models.items()
    }
