"""Read a tower's heads: second moments over images, the texts that span them, and names by every judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.families import clip
from patches.families.base import Base
from patches.families.clip.direct import Lens
from registry.errors import ConfigError
from training.clip_heads import names as labels
from training.clip_heads.config import Config
from training.clip_heads.names import NONE, Model, Named
from training.data import layouts
from training.data.images import Dataset
from training.lab import pool as lab_pool
from training.lab import worlds
from training.progress import tqdm
from training.tasks import recognition as tasks
from training.tasks.intervals import wilson
from training.tasks.textspan import HeadMoments, Span, moments, read_pool, spans

LEAST = 0.05
"""Largest p at which a head counts as being about a property besides its own label"""
Head = tuple[int, int]
"""(layer, head)"""


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything measured on a tower's attention heads: second moments, texts, names and scores."""

    pool: tuple[str, ...]
    properties: tuple[str, ...]
    fits: Tensor
    """(M, P) bool: whether each text of the pool is about each property"""
    features: Tensor
    """(M, k) unit embeddings of the pool's texts"""
    seen: HeadMoments
    spans: list[Span]
    named: list[Named]
    score: Tensor
    """(L, H, P) score by which the heads of a property are ordered"""
    p: Tensor
    """(L, H, P) p values of the scores, Bonferroni-corrected over the P properties"""
    trail: list[dict[str, Any]]
    """Changes of labels by a person, oldest first"""
    judges: dict[str, list[str]]
    """Judge -> its label of every head"""

    def heads(self, name: str) -> list[Head]:
        """Order all heads by how much they are about a property.

        First those with this label, by score; then those whose score is significant (p up to LEAST); then the rest, by
        distance to their own top property.
        """
        if name not in self.properties:
            raise ConfigError(f"There is no property {name[:40]!r}. Properties: {', '.join(self.properties)}.")
        column = self.properties.index(name)
        mine, p = self.score[..., column].flatten(), self.p[..., column].flatten()
        short = mine - self.score.amax(-1).flatten()
        named = [n.label == name for n in self.named]
        tier = [0 if is_named else 1 if float(v) <= LEAST else 2 for is_named, v in zip(named, p, strict=True)]
        order = sorted(range(len(tier)), key=lambda i: (tier[i], -float(mine[i] if tier[i] == 0 else short[i])))
        H = self.score.shape[1]
        return [(self.seen.layers[i // H], i % H) for i in order]


def chosen_layers(config: Config, lens: Lens) -> tuple[int, ...]:
    """Return the layers whose heads are read. Default: all of at most 8, else the last four."""
    return config.layers or tuple(range(0 if lens.layers <= 8 else lens.layers - 4, lens.layers))


def scenes(config: Config, n: int, split: str = "train") -> Iterator[Dataset]:
    """Yield the image sets on which heads are read.

    These are the real data set, or from the lab a quarter each of single objects, objects with words, crowds and
    people.
    """
    if layouts.named(config.data).folder:
        yield tasks.world(config, config.task, split, n)
        return
    quarter = max(2, n // 4)
    for name in ("imagenet", "typographic", "coco", "celeba"):
        yield worlds.WORLDS[name](split, quarter, config.seed, device=config.device)


def find(base: Base, config: Config) -> Findings:
    """Accumulate second moments of a base's heads over train images and name the heads from them."""
    lens = Lens(base)
    at = chosen_layers(config, lens)
    if bool(config.pool) != bool(config.taxonomy):
        raise ConfigError("pool and taxonomy belong together: the lab's properties are those of its own pool.")
    if config.pool:
        pool = read_pool(config.pool)
        taxonomy: dict[str, Sequence[str]] = dict(labels.read_taxonomy(config.taxonomy))
        fits = labels.by_keyword(pool, taxonomy)
        enough = [i for i, n in enumerate(fits.sum(0).tolist()) if n >= 2]
        properties = tuple(p for i, p in enumerate(taxonomy) if i in enough)
        taxonomy, fits = {p: taxonomy[p] for p in properties}, fits[:, enough]
        if len(properties) < 2:
            raise ConfigError(f"Of {config.taxonomy} fewer than two properties have two texts in {config.pool}.")
    else:
        pool, properties, fits = lab_pool.texts(), lab_pool.PROPERTIES, lab_pool.fits()
        taxonomy = {p: [t for t, kind in lab_pool.sentences() if kind == p] for p in properties}
    features = clip.embed_texts(base, pool)

    def batches() -> Iterator[Tensor]:
        for data in scenes(config, config.span_images):
            for part in tqdm(data.batches(32), "heads", disable=None, leave=False):
                yield base.processor.image(part.image)

    seen = moments(lens, batches(), at, share=config.share)
    found = spans(seen, features, config.texts, config.rank, config.normalise_pool)
    by, score, p = labels.by_spectrum(seen, features, fits, properties, config.shuffles, seed=config.seed)
    known = dict(zip(pool, features, strict=True))

    def embed(t: Sequence[str]) -> Tensor:
        return torch.stack([known[x] for x in t]) if all(x in known for x in t) else clip.embed_texts(base, t)

    near = labels.by_embedding(pool, taxonomy, embed)
    named: dict[str, list[Named]] = {
        "spectrum": by,
        "keyword": labels.label(found, fits, properties, "keyword"),
        "embedding": labels.label(found, near, properties, "embedding"),
    }
    if config.judge == "model":
        named["model"] = asked_model(config, found, pool, properties, fits)
    mine, trail = labels.override(named[config.judge], labels.read_changes(config.changes) if config.changes else [])
    judges = {k: [n.label for n in v] for k, v in named.items()}
    return Findings(pool, properties, fits, features, seen, found, mine, score, p, trail, judges)


def asked_model(
    config: Config, found: Sequence[Span], pool: Sequence[str], properties: Sequence[str], fits: Tensor, shown: int = 5
) -> list[Named]:
    """Label every head by asking a language model about its texts.

    An answer that means one of our properties becomes that property. Without a person's examples the prompt shows texts
    of each property.
    """
    g = torch.Generator().manual_seed(config.seed)
    examples = list(config.examples)
    for column, name in enumerate(() if examples else properties):
        rows = fits[:, column].nonzero()[:, 0]
        some = rows[torch.randperm(len(rows), generator=g)[:shown]].tolist()
        examples.append((tuple(pool[i] for i in some), name))
    model = Model(config.endpoint, examples)
    known = {labels.normalised(p): p for p in properties}
    out = []
    for s in tqdm(found, "labels", disable=None, leave=False):
        said = model.name([pool[i] for i in s.texts]) if s.texts else NONE
        out.append(Named(s.layer, s.head, known.get(said, said), "model", 0.0, 1.0))
    return out


def about(f: Findings, base: Base, config: Config) -> dict[str, Any]:
    """Return the findings as plain JSON values, as services and figures read them."""
    own = {p: spans(f.seen, _apart(f, i), min(5, int(f.fits[:, i].sum()))) for i, p in enumerate(f.properties)}
    rows = {p: f.fits[:, i].nonzero()[:, 0].tolist() for i, p in enumerate(f.properties)}
    heads = []
    for n, (named, s) in enumerate(zip(f.named, f.spans, strict=True)):
        column = f.properties.index(named.label) if named.label in f.properties else -1
        texts = [
            {"text": f.pool[i], "share": round(v, 5), "fits": bool(column >= 0 and f.fits[i, column])}
            for i, v in zip(s.texts, s.share, strict=True)
        ]
        within = own[named.label][n].texts if column >= 0 else ()
        heads.append(
            {
                "layer": named.layer, "head": named.head, "label": named.label, "source": named.source,
                "score": round(named.score, 4), "p": round(named.p, 6), "texts": texts,
                "apart": [f.pool[rows[named.label][i]] for i in within],
                "explained": round(sum(s.share), 4), "explained_random": round(s.random, 4), "rank": s.rank,
                "variance": round(s.variance, 8),
                "also": [
                    f.properties[i]
                    for i in f.score.flatten(0, 1)[n].argsort(descending=True).tolist()
                    if float(f.p.flatten(0, 1)[n, i]) <= LEAST and f.properties[i] != named.label
                ],
                "scores": [round(v, 4) for v in f.score.flatten(0, 1)[n].tolist()],
                "judges": {k: v[n] for k, v in f.judges.items()},
            }
        )  # fmt: skip
    mine = [n.label for n in f.named]
    agreement = {k: labels.kappa(mine, v) for k, v in f.judges.items()}
    measured = {
        "consistency": labels.consistency(f.named, f.spans, f.fits, f.properties),
        "sharing": labels.sharing([x for x in mine if x != NONE] or [NONE], f.judges["keyword"]),
        "named": wilson(torch.tensor([x != NONE for x in mine])),
        "kappa": agreement,
        "pictures": f.seen.count,
        "pool": len(f.pool),
    }
    order = {p: f.heads(p) for p in f.properties}
    return {"properties": list(f.properties), "heads": heads, "order": order, "trail": f.trail, "metrics": measured}


def _apart(f: Findings, column: int) -> Tensor:
    """Return a property's text embeddings (m, k), centred."""
    T = f.features[f.fits[:, column]]
    return T - T.mean(0)
