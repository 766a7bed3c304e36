"""clip_heads: what each attention head of CLIP is about, named by texts; and patches that silence heads by name.

Papers: Madasu, Gandelsman, Lal, Howard, "Quantifying and enabling the interpretability of CLIP-like models", arXiv
2409.06579; TEXTSPAN and mean-ablation: Gandelsman, Efros, Steinhardt, arXiv 2310.05916. Claim: heads have properties
(places, colours, letters) that texts name, and taking away the heads of a property that should not matter makes the
model right where it was not: Waterbirds' worst group 47.7 -> 72.9 % on ViT-L/14 (from memory of the paper's table).

    patchbay fit clip_heads/tiny        # a random tower: seconds on a CPU
    patchbay fit clip_heads/lab         # lab:clip: heads of background, text, colour, people, food
    patchbay fit clip_heads/waterbirds  # background heads away, chosen on val
    patchbay fit clip_heads/paper data=/folder/of/waterbirds pool=texts.txt taxonomy=taxonomy.json
    python -m training.clip_heads FOLDER REPORT.json    # a sealed patch on test, beside random heads; each property's
                                                        # heads away against each property's own question

Second moments of what heads add to the embedding are gathered over pictures of the train split
(training/tasks/textspan.py), texts and labels follow from them alone (names.py). Heads of each property of `ablate`
are ordered by that property's score; (property, number, mode) is chosen on val. Nothing is chosen on test.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from patches import artifact
from patches.engine.patch import Patch
from patches.engine.read import record
from patches.evidence.gallery import directions, make, save_gallery
from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip import maps as heatmap
from patches.families.clip.direct import Lens, Share
from patches.mechanisms.heads import HeadConfig, HeadEdit, Mode
from patches.subject import Subject
from registry import config as configs
from registry.config import STRICT
from registry.errors import ConfigError
from registry.manifest import Manifest, canonical
from training.clip_heads import names as labels
from training.clip_heads.names import NONE, Endpoint, Model, Named
from training.data.images import Dataset
from training.lab import pool as lab_pool
from training.lab import worlds
from training.lab.probes import PROBES, Probe
from training.tasks import recognition as tasks
from training.tasks.intervals import wilson
from training.tasks.recognition import (
    GOAL,
    KEPT,
    Classifier,
    affordable,
    ask,
    classifier,
    metrics,
    outcomes,
    pictures,
    seal_labels,
    worth,
)
from training.tasks.textspan import Moments, Span, moments, read_pool, spans

Task = Literal["typographic", "waterbirds", "celeba"]
LEAST = 0.05
"""p up to which a head is about a property, beside what it is called"""
Head = tuple[int, int]
"""layer, head"""
Judge = Literal["spectrum", "keyword", "embedding", "model"]


@dataclass(frozen=True)
class Config:
    """What to read, how to name it, what to take away and how to measure it."""

    __pydantic_config__ = STRICT

    base: str = "lab:clip"
    """reference of a CLIP: `lab:clip`, `open-clip:model/tag`, `hf-hub:org/name@revision`, `local-dir:path`"""
    device: str = "cpu"
    seed: int = 0
    task: Task = "typographic"
    classifier: Classifier = "zero-shot"
    """of groups also `probe`, a linear one fitted on train; it is sealed with the patch and served as its label set"""
    data: str = ""
    """folder of the real data set; empty: its twin in the lab world"""
    layers: tuple[int, ...] = ()
    """whose heads are read; empty: all of a tower of up to 8 layers, else the last four, as published"""
    pool: str = ""
    """.txt of the texts heads are named by, one a line; empty: the lab's own"""
    taxonomy: str = ""
    """JSON of property -> phrases; empty: the lab's own. Needed with `pool`"""
    span_images: int = 1024
    """pictures behind the second moments"""
    share: Share = "own"
    """how LayerNorm's mean is shared; `apportioned` as in the authors' code"""
    texts: int = 10
    """of a head"""
    rank: int = 80
    normalise_pool: bool = False
    judge: Judge = "spectrum"
    """whose labels count; the others' stand beside them with their agreement"""
    shuffles: int = 100
    """of texts over properties behind the spectrum's null"""
    endpoint: Endpoint = field(default_factory=Endpoint)
    """of judge=model"""
    examples: tuple[tuple[tuple[str, ...], str], ...] = ()
    """of judge=model: texts of a head and its name, by a person; without any it is shown texts of each property"""
    changes: str = ""
    """JSON list of labels that a person changed: layer, head, label, who, why, at"""
    ablate: tuple[str, ...] = ("text",)
    """properties whose heads may be taken away"""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    modes: tuple[Mode, ...] = ("mean", "zero")
    tokens: Literal["all", "cls"] = "cls"
    draws: int = 5
    """random sets of as many heads that the chosen one is held against"""
    bound: float = 0.02
    """clean accuracy (typographic) or average accuracy (groups) that an edit may cost on val"""
    gallery_images: int = 256
    """pictures that are sealed with the patch, to look for neighbours in"""
    val_images: int = 384
    test_images: int = 500
    word: str = ""
    """of no task here"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", span_images=24, texts=4, counts=(1, 2), draws=2, gallery_images=12, val_images=24, test_images=24,
        modes=("mean",), bound=1.0, shuffles=20,
    ),
    "lab": Config(ablate=("text",), counts=(2, 4, 8, 12), modes=("mean",), tokens="all"),
    "waterbirds": Config(
        task="waterbirds", classifier="probe", ablate=("background",), counts=(1, 2, 3, 4, 6), tokens="cls",
    ),
    "paper": Config(
        base="hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K", device="cuda", task="waterbirds", span_images=5000,
        texts=20, ablate=("location", "setting"), counts=(2, 4, 6, 8, 12), modes=("mean",), val_images=1199,
        test_images=5794,
    ),
}  # fmt: skip


# ---- what heads say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Findings:
    """What was read off a tower's heads."""

    pool: tuple[str, ...]
    properties: tuple[str, ...]
    fits: Tensor
    """(M, P) bool: which property each text of the pool is about"""
    features: Tensor
    """(M, k) of the pool"""
    seen: Moments
    spans: list[Span]
    named: list[Named]
    score: Tensor
    """(L, H, P) by which heads of a property are ordered"""
    p: Tensor
    """(L, H, P) of the scores, times P"""
    trail: list[dict[str, Any]]
    """labels that a person changed"""
    judges: dict[str, list[str]]
    """labels by every judge that was asked"""

    def heads(self, name: str) -> list[Head]:
        """All heads: those that bear this name, by score; then those that are about it among other things (p up to
        LEAST), and all others, by how near it comes to being what they are most about."""
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
    return config.layers or tuple(range(0 if lens.layers <= 8 else lens.layers - 4, lens.layers))


def scenes(config: Config, n: int, split: str = "train") -> Iterator[Dataset]:
    """Pictures to read heads on: the data set itself, or of the lab a quarter each of single things, of things with
    words, of crowds and of people."""
    if config.data:
        yield tasks.world(config, config.task, split, n)
        return
    quarter = max(2, n // 4)
    for name in ("imagenet", "typographic", "coco", "celeba"):
        yield worlds.WORLDS[name](split, quarter, config.seed, device=config.device)


def find(base: Base, config: Config) -> Findings:
    """Moments, texts and labels of the heads of a base."""
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
        named["model"] = _asked(config, found, pool, properties, fits)
    mine, trail = labels.override(named[config.judge], labels.read_changes(config.changes) if config.changes else [])
    judges = {k: [n.label for n in v] for k, v in named.items()}
    return Findings(pool, properties, fits, features, seen, found, mine, score, p, trail, judges)


def _asked(
    config: Config, found: Sequence[Span], pool: Sequence[str], properties: Sequence[str], fits: Tensor, shown: int = 5
) -> list[Named]:
    """A language model's label of each head; one of our properties if it means one of them. Without examples by a
    person it is shown, for each property, texts of the pool that fit."""
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
    """Everything that was found, as plain values: what services and figures read."""
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
    """(m, k) texts of a property less their mean: what lies between them."""
    T = f.features[f.fits[:, column]]
    return T - T.mean(0)


# ---- edits -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def means(base: Base, config: Config) -> Tensor:
    """(L, H, e) what each head gives on average over pictures of train: at the class token, or over all tokens."""
    lens = Lens(base)
    sites = [clip.site("heads", i) for i in range(lens.layers)]
    total, count = torch.zeros(lens.layers, lens.out.shape[2] * lens.heads), 0

    def average(x: Tensor) -> Tensor:  # (B, T, D) -> (D,)
        return (x[:, 0] if config.tokens == "cls" else x.mean(1)).float().sum(0)

    for data in scenes(config, min(config.span_images, 256)):
        for part in data.batches(32):
            with record(base.model, sites, "input", average) as acts:
                clip.embed_images(base, part.image, batch=len(part))
            total += torch.stack([acts[s][0].cpu() for s in sites])
            count += len(part)
    return (total / count).reshape(lens.layers, lens.heads, -1)


def silence(lens: Lens, heads: Sequence[Head], mode: Mode, tokens: str, mean: Tensor) -> HeadEdit:
    """The edit that takes these heads away."""
    config = HeadConfig(clip.SITES["heads"], tuple(heads), lens.heads, mode, "cls" if tokens == "cls" else "all")
    value = {"value": torch.stack([mean[layer, head] for layer, head in heads])} if mode == "mean" else {}
    return HeadEdit(config, value)


def random_heads(heads: Sequence[Head], every: Sequence[Head], seed: int) -> list[Head]:
    """As many others, each out of the layer of the one it stands for while there are others in it."""
    g = torch.Generator().manual_seed(seed)
    order = [every[i] for i in torch.randperm(len(every), generator=g).tolist() if every[i] not in heads]
    out: list[Head] = []
    for layer, _ in heads:
        left = [h for h in order if h not in out]
        out.append(next((h for h in left if h[0] == layer), left[0] if left else heads[len(out)]))
    return out


def measure(
    base: Base, config: Config, sets: Mapping[str, Dataset], by: LabelSet, patch: Patch | None
) -> dict[str, float]:
    with patch.apply(base.model, root=base.root) if patch else nullcontext():
        return metrics(config, {k: ask(base, config, d, by) for k, d in sets.items()})


def fit(config: Config, folder: Path) -> Manifest:
    """Read and name the heads, choose on val which to take away, seal the edit with names, evidence and a gallery."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    lens = Lens(base)
    f = find(base, config)
    mean = means(base, config)
    val = pictures(config, "val", config.val_images)
    by = classifier(base, config, val["clean"])
    plain = measure(base, config, val, by, None)
    every = [(layer, h) for layer in f.seen.layers for h in range(lens.heads)]
    rows: list[dict[str, Any]] = []
    counts = affordable(config.counts, len(every))
    tried = [(p, n, m) for p in config.ablate for n in counts for m in config.modes]
    for name, count, mode in tqdm(tried, "edits", disable=None, leave=False):
        heads = f.heads(name)[:count]
        got = measure(base, config, val, by, silence(lens, heads, mode, config.tokens, mean))
        named = sum(x.label == name for x in f.named if (x.layer, x.head) in heads)
        about_it = {"property": name, "count": count, "mode": mode, "heads": heads, "named": named}
        rows.append({**about_it, **got, "worth": worth(config, got, plain)})
    if not rows:
        raise ConfigError(f"ablate={config.ablate} and modes={config.modes} leave nothing to try; name some of each.")
    best = max(rows, key=lambda r: r["worth"])
    patch = silence(lens, best["heads"], best["mode"], config.tokens, mean)
    controls = []
    for draw in range(config.draws):
        other = random_heads(best["heads"], every, config.seed + draw)
        got = measure(base, config, val, by, silence(lens, other, best["mode"], config.tokens, mean))
        controls.append({"heads": other, **got})
    report = {"task": config.task, "base": plain, "candidates": rows, "chosen": best, "random": controls}
    (folder / "heads.json").write_bytes(canonical(json.loads(json.dumps(about(f, base, config)))))
    save_file({"mean": mean.cpu().contiguous()}, folder / "means.safetensors")
    seal_labels(config, by, folder)
    _examples(lens, config, f, report, folder)
    (folder / "report.json").write_bytes(canonical(json.loads(json.dumps(report))))
    if config.gallery_images:
        covariance = torch.stack(
            [torch.stack([f.seen.covariance(n, h) for h in range(lens.heads)]) for n in range(len(f.seen.layers))]
        )
        basis = directions(covariance)
        save_gallery(make(lens, _shown(base, config), f.seen.layers, basis, config.share), folder / "gallery")
    return artifact.save(patch, "clip_heads", folder, base=base.label)


def _examples(lens: Lens, config: Config, f: Findings, report: dict[str, Any], folder: Path, count: int = 6) -> None:
    """For the figure: a few pictures of val and where the best head of each property speaks of its first text; last,
    all heads of the class that is predicted against the mean of classes."""
    base = lens.base
    data = next(iter(scenes(config, 4 * count, "val")))
    batch = data.read(range(min(count, len(data))))
    x = base.processor.image(batch.image)
    rows: list[str] = []
    maps: list[Tensor] = []
    for name in f.properties:
        head = f.heads(name)[0]
        found = next(s for s in f.spans if (s.layer, s.head) == head)
        own = [i for i in found.texts if f.fits[i, f.properties.index(name)]] or list(found.texts)
        if own:
            rows.append(f"{name}, head {head[0]}.{head[1]}: {f.pool[own[0]]}")
            maps.append(heatmap.grid(lens, x, f.features[own[:1]], [head])[:, 0])
    weights = clip.zero_shot(base, data.classes) if len(set(data.classes)) == len(data.classes) else None
    if weights is not None:
        predicted = (clip.embed_images(base, x) @ weights).argmax(1)
        every = heatmap.grid(lens, x, (weights - weights.mean(1, keepdim=True)).T)
        rows.append("all heads, the predicted class")
        maps.append(every[torch.arange(len(x)), predicted])
        report["predicted"] = [data.classes[i] for i in predicted.tolist()]
    report["rows"] = rows
    save_file(
        {"image": batch.image.cpu().contiguous(), "maps": torch.stack(maps).cpu().contiguous()},
        folder / "examples.safetensors",
    )


def _shown(base: Base, config: Config) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Pictures of val for the gallery."""
    number = 0
    for data in scenes(config, config.gallery_images, "val"):
        for part in data.batches(32):
            names = [f"{data.name}/{data.split} {number + i}" for i in range(len(part))]
            number += len(part)
            yield base.processor.image(part.image), part.image, names


# ---- measuring a model -------------------------------------------------------------------------------------------


def evaluate(model: Subject, config: Config, arm: str | None) -> dict[str, float]:
    """The task's metrics on test, and for the lab's twins in the style no lab model was trained on (`_held`)."""
    return tasks.evaluate(model, config, arm)


def report(folder: Path, out: Path) -> dict[str, Any]:
    """A sealed edit on test beside random heads, and what taking away each property's heads does to each property's own
    question (training/lab/probes.py), beside random heads. docs/LOG.md's tables. Writes JSON as it goes."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    lens = Lens(base)
    sealed_as, patch = artifact.load(folder, base=base.digest, device=base.device)
    assert isinstance(patch, HeadEdit)
    fitted = json.loads((folder / "report.json").read_text())
    mean = load_file(folder / "means.safetensors")["mean"].to(base.device)
    c = patch.config
    arms: dict[str, HeadEdit | None] = {"base": None, "clip_heads": patch}
    for i, other in enumerate(fitted["random"]):
        arms[f"random {i}"] = silence(lens, [(a, b) for a, b in other["heads"]], c.mode, c.tokens, mean)
    results: dict[str, Any] = {
        "digest": sealed_as.digest,
        "recipe": sealed["recipe"],
        "chosen": fitted["chosen"],
        "arms": {},
    }
    splits = ["test", *([] if config.data else ["held"])]
    sets = {split: pictures(config, split, config.test_images) for split in splits}
    by = {split: classifier(base, config, s["clean"], folder=folder) for split, s in sets.items()}
    for name, arm in tqdm(arms.items(), "arms", disable=None):
        row: dict[str, Any] = {}
        for split in splits:
            with arm.apply(base.model, root=base.root) if arm else nullcontext():
                said = {k: ask(base, config, d, by[split]) for k, d in sets[split].items()}
            row[split] = {k: wilson(v) for k, v in outcomes(config, said).items()}
            if "average" in row[split]:
                row[split]["worst_group"] = min(v for k, v in row[split].items() if k != "average")
        results["arms"][name] = row
        out.write_text(json.dumps(results, indent=1))
        tqdm.write(f"{name}: {json.dumps(row)}")
    if not config.data and not config.pool:
        results["properties"] = specificity(base, lens, config, folder, mean)
        out.write_text(json.dumps(results, indent=1))
    return results


def specificity(base: Base, lens: Lens, config: Config, folder: Path, mean: Tensor, count: int = 4) -> dict[str, Any]:
    """property -> question -> share right with the property's first `count` heads at their means at the class token,
    n = images of test; beside it the base, random heads of the same layers (mean, lowest, highest of `draws`), and who
    carries the answers to the property's own question directly."""
    images = min(300, config.test_images)
    found = json.loads((folder / "heads.json").read_text())
    every = [(h["layer"], h["head"]) for h in found["heads"]]
    sets = {name: probe(base, "test", images, config.seed) for name, probe in PROBES.items()}

    def right(heads: Sequence[Head]) -> dict[str, float]:
        patch = silence(lens, heads, "mean", config.tokens, mean) if heads else None
        with patch.apply(base.model, root=base.root) if patch else nullcontext():
            return {name: probe.share(base) for name, probe in sets.items()}

    out: dict[str, Any] = {"base": right([]), "n": images, "count": count}
    for name in tqdm(PROBES, "properties", disable=None):
        heads = [(a, b) for a, b in found["order"][name][:count]]
        label = {(h["layer"], h["head"]): h["label"] for h in found["heads"]}
        chance = [right(random_heads(heads, every, draw)) for draw in range(config.draws)]
        spread = {k: [r[k] for r in chance] for k in chance[0]} if chance else {}
        out[name] = {
            "heads": heads,
            "named": [label[h] == name for h in heads],
            "without": right(heads),
            "random": {k: [round(sum(v) / len(v), 4), min(v), max(v)] for k, v in spread.items()},
            "carried": carriers(lens, sets[name]),
        }
        tqdm.write(f"{name}: {json.dumps(out[name])}")
    return out


@torch.no_grad()
def carriers(lens: Lens, probe: Probe, top: int = 4) -> dict[str, Any]:
    """Who carries the answers to a question directly: shares of the mean margin <part, t_right - mean of answers> of
    all heads, of all MLPs, of constants; and the heads with the largest shares. What no head carries, none can lose."""
    total = torch.zeros(lens.layers, lens.heads)
    mlps = constant = 0.0
    for i in range(0, len(probe.image), 50):
        at = slice(i, i + 50)
        part = lens.read(lens.base.processor.image(probe.image[at]).to(lens.base.device))
        words, right = probe.answers.T, probe.right[at]
        may = words.new_ones(len(right), len(words)) if probe.open is None else probe.open[at].to(words)
        apart = words[right] - may @ words / may.sum(1, keepdim=True)  # (B, k)
        apart = apart.to(part.y) / part.norm[:, None]
        total += torch.einsum("blhk,bk->lh", part.heads, apart).cpu()
        mlps += float(torch.einsum("blk,bk->", part.mlps, apart))
        constant += float(torch.einsum("bk,bk->", part.bias + part.rest, apart))
    whole = float(total.sum()) + mlps + constant
    order = total.flatten().argsort(descending=True)[:top].tolist()
    best = [[i // lens.heads, i % lens.heads, round(float(total.flatten()[i]) / whole, 4)] for i in order]
    shares = {"heads": float(total.sum()), "mlps": mlps, "constants": constant}
    return {**{k: round(v / whole, 4) for k, v in shares.items()}, "best": best}


# ---- pictures ----------------------------------------------------------------------------------------------------


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Head x property, candidates beside random heads, base beside patched on test."""
    from matplotlib.figure import Figure

    found, fitted = (json.loads((folder / n).read_text()) for n in ("heads.json", "report.json"))
    goal, kept = GOAL[fitted["task"]], KEPT[fitted["task"]]
    heads, names = found["heads"], found["properties"]
    out: dict[str, Any] = {}
    score = torch.tensor([h["scores"] for h in heads])
    f = Figure(figsize=(1.5 + 0.6 * len(names), 1 + 0.17 * len(heads)), layout="constrained")
    a = f.subplots()
    top = float(score.clamp_min(0).flatten().quantile(0.98)) or 1.0
    shown = a.imshow(score.numpy(), aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top)
    a.set_xticks(range(len(names)), names, rotation=40, fontsize=8)
    a.set_yticks(range(len(heads)), [f"{h['layer']}.{h['head']} {h['label']}" for h in heads], fontsize=6)
    f.colorbar(shown, ax=a, shrink=0.5, label="log, against other heads")
    a.set(title="What each head tells apart")
    out["heads"] = f

    f = Figure(figsize=(7, 4), layout="constrained")
    a = f.subplots()
    for name, mode in sorted({(r["property"], r["mode"]) for r in fitted["candidates"]}):
        mine = [r for r in fitted["candidates"] if (r["property"], r["mode"]) == (name, mode)]
        (line,) = a.plot([r["count"] for r in mine], [r[goal] for r in mine], marker="o", label=f"{name}, {mode}")
        a.plot([r["count"] for r in mine], [r[kept] for r in mine], ":", color=line.get_color())
    for r in fitted["random"]:
        a.plot(fitted["chosen"]["count"], r[goal], "x", color="black")
    a.axhline(fitted["base"][goal], color="grey", label="base")
    a.axhline(fitted["base"][kept], color="grey", linestyle=":", label=f"{kept} (dotted)")
    a.set(title=f"Choosing on val: {goal.replace('_', ' ')}; crosses: random heads", xlabel="heads")
    a.grid(alpha=0.25)
    a.legend(fontsize=7)
    out["candidates"] = f

    seen = load_file(folder / "examples.safetensors")
    image, maps = seen["image"].float() / 255, seen["maps"]
    f = Figure(figsize=(1.5 + 1.3 * len(image), 1.4 * (len(maps) + 1)), layout="constrained")
    panels = f.subplots(len(maps) + 1, len(image), squeeze=False)
    for i, picture in enumerate(image):
        panels[0][i].imshow(picture.permute(1, 2, 0).numpy())
        for row, grid in enumerate(maps, 1):
            panels[row][i].imshow(heatmap.overlay(picture, grid[i], 96).permute(1, 2, 0).numpy())
    for row, name in enumerate(["", *fitted["rows"]]):
        panels[row][0].set_title(name, fontsize=7, loc="left")
    for a in panels.flat:
        a.axis("off")
    out["segments"] = f

    out["test"] = tasks.bars(results)
    return out


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]))
