"""clip_sae: sparse autoencoders on CLIP's image tower, and patches that suppress or steer what they find.

Paper: Joseph et al., "Steering CLIP's vision transformer with sparse autoencoders", arXiv 2504.08729. Claim: zeroing a
chosen set of features at a middle layer, the rest of the activation kept, takes away what should not matter (a written
word, the ground behind a bird, gender behind hair) and hardly anything else; random features do nothing.

    patchbay fit clip_sae/tiny          # a random tower: seconds on a CPU
    patchbay fit clip_sae/lab           # typographic defence of lab:clip: 5 to 7 minutes on 2 cores
    patchbay fit clip_sae/paper data=/folder/of/imagenet    # ViT-B/32 DataComp, vanilla SAE; needs a GPU
    patchbay fit clip_sae/layers        # every layer in short, features beside neurons
    python -m training.clip_sae FOLDER REPORT.json [SEED [IMAGES]]    # a sealed patch on test beside controls and
                                                                     # other defences

A dictionary is trained per candidate layer (or read from `dictionary`), its features are ranked, or gated
(gates.py), on pictures of the train split with and without what should not matter, and (layer, ranking, number
of features) is chosen on val among those that cost no more than `bound` of clean accuracy. Nothing is chosen on test.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from patches import artifact
from patches.evidence.feature_cards import save_cards
from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.families.base import Base, load_base, slug
from patches.mechanisms.features import SAE, FeatureEdit, Op, Tokens, edit, load_sae, save_sae
from patches.subject import Subject
from registry import config as configs
from registry import manifest
from registry.config import STRICT
from registry.errors import ConfigError
from registry.home import home
from registry.manifest import Manifest, canonical, digest_of
from training.clip_sae import cards
from training.clip_sae.defences import DEFENCES, Defence, judge, pairs
from training.clip_sae.dictionary import BINS, Quality, SAEConfig, activations, principal_variance, train
from training.clip_sae.gates import GateConfig, Lesson, learn
from training.clip_sae.steerability import Steerability, after_block, after_last_block
from training.clip_sae.streams import Hook, Stream, answers, applied, finish, streams
from training.data import images as readers
from training.data.images import Dataset
from training.lab import atlas
from training.tasks import recognition as tasks
from training.tasks.intervals import wilson
from training.tasks.recognition import (
    GOAL,
    KEPT,
    Classifier,
    Task,
    affordable,
    ask,
    classifier,
    metrics,
    outcomes,
    pictures,
    seal_labels,
    share,
    world,
    worth,
)

Rank = Literal["difference", "effect", "gates"]


@dataclass(frozen=True)
class Config:
    """What to fit and how to measure it."""

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
    layers: tuple[int, ...] = (4,)
    """candidates, 0-based; a dictionary is trained for each"""
    hook: Hook = "block"
    """the stream after the block (resid_post), or what its MLP adds (mlp_out)"""
    which: Literal["all", "cls", "patches"] = "all"
    """tokens the dictionary is trained on"""
    sae: SAEConfig = field(default_factory=SAEConfig)
    chunk: int = 256
    """pictures per chunk of activations"""
    dictionary: str = ""
    """folder of a published dictionary, SAELens' or Prisma's layout; {layer} in it stands for the layer; `lab:clip-sae`
    is the one that ships. Nothing is trained then"""
    ranks: tuple[Rank, ...] = ("difference", "effect", "gates")
    """how features are ordered: by how much more they fire where the thing that should not matter is; by what taking
    them away does to the true class to first order; by how far learned gates close (gates.py), which also say
    how much of each is left, whatever `op` is"""
    gates: GateConfig = field(default_factory=GateConfig)
    counts: tuple[int, ...] = (50, 100, 250, 500, 1000)
    """candidates; those above half of the dictionary are left out, since a control takes as many others"""
    strengths: tuple[float, ...] = (1.0,)
    """how much of what gates say is taken away, as far as candidates go"""
    op: Op = "zero"
    value: float = 0.0
    """of the ops that take one; for steer in multiples of the feature's largest activation"""
    levels: tuple[float, ...] = (0.0,)
    """of op=zero: what is left of a feature, whatever it was, in multiples of its mean over groups; candidates. Nothing
    at all may say as much of a class as what was there: without any ground a bird is a bird of the land"""
    tokens: Tokens = "all"
    """that are edited"""
    word: str = ""
    """of steer: the class to steer to"""
    steer_features: int = 0
    """so many features and neurons of every layer are compared by how they steer; 0: none"""
    steer_strengths: tuple[float, ...] = (1.0, 2.0)
    """what they are set to, in mean norms of a layer's tokens: below 1 next to nothing steers, at 4 nearly all"""
    folds: tuple[str, ...] = ()
    """of the lab's groups: hands of drawing (worlds.HANDS) that are left out in turn. A candidate then counts by its
    mean worth over them and val, which alone is one hand's"""
    within: float = 0.0
    """of a layer's candidates that are worth so much less than the best at most, the one with the fewest features is
    taken: what they cost whoever serves them is proportional to their number"""
    bound: float = 0.01
    """clean accuracy (typographic) or average accuracy (groups) that an edit may cost on val"""
    fit_images: int = 384
    val_images: int = 384
    test_images: int = 500


_SMALL = SAEConfig(features=96, k=6, steps=12, batch=128, warmup=4, dead_after=4)

_LAB = SAEConfig(features=2048, batch=2048, steps=600, passes=3)
"""a dictionary for two cores: smaller batches of fewer features learn more in a minute than one of 4,096 x 4,096"""

RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", layers=(1,), sae=_SMALL, chunk=48, counts=(4, 16), fit_images=24, val_images=24, test_images=24,
        gates=GateConfig(steps=4, batch=8),
    ),
    "lab": Config(
        layers=(4,), sae=_LAB, ranks=("gates",), counts=(100, 200, 300, 400, 600), fit_images=1024,
        gates=GateConfig(steps=500, batch=8, keep=30, shun=2.0, price=1.5e-3),  # 200 features do what 600 did at 2e-4
        within=0.025,  # a standard error of .6 among 384
    ),
    "demo": Config(
        layers=(4,), dictionary="lab:clip-sae", ranks=("gates",), counts=(300,),
        gates=GateConfig(steps=180, batch=8, keep=30, shun=2.0, price=1.5e-3),
        fit_images=256, val_images=96, test_images=150,
    ),
    "layers": Config(
        layers=tuple(range(8)), sae=replace(_LAB, steps=120), ranks=("difference",), counts=(200, 400, 800),
        steer_features=32, fit_images=128, val_images=192,
    ),
    "waterbirds": Config(
        task="waterbirds", classifier="probe", dictionary="lab:clip-sae", ranks=("difference",),
        counts=(10, 20, 30, 50), levels=(0.25, 0.5, 1.0), folds=("noto", "fluent-emoji"), fit_images=512,
        val_images=480,
    ),
    "celeba": Config(
        task="celeba", sae=_LAB, ranks=("difference", "gates"), counts=(50, 200, 1000), fit_images=512,
        gates=GateConfig(steps=100, keep=0.1),
    ),
    "steer": Config(task="steer", layers=(7,), word="owl", op="clamp", value=4.0, counts=(1, 2, 4)),
    "paper": Config(
        base="hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", device="cuda", layers=tuple(range(12)),
        sae=SAEConfig(method="vanilla", features=64 * 768, l1=1e-5, steps=158_691, warmup=500, dead="auxiliary",
                      normalise="layer_norm"),
        chunk=2048, fit_images=2000, val_images=2000, test_images=10_000,
    ),
}  # fmt: skip


# ---- which features ----------------------------------------------------------------------------------------------


@torch.no_grad()
def fires(sae: SAE, stream: Stream) -> Tensor:
    """(n, F) activation summed over tokens."""
    return torch.cat([sae.encode(part.x).sum(1) for part in stream.parts()])


def by_difference(config: Config, sae: SAE, seen: Mapping[str, Stream]) -> Tensor:
    """(F,) how much more a feature fires where what should not matter is, over what it is otherwise.

    Pairs (clean, attacked): the mean increase over the clean mean, so that what clean pictures need comes last (over
    the increase's deviation instead, 300 features cost 4 points of clean accuracy; so, none: n = 160 of val). Groups:
    |Cohen's d| of the place less that of the label, so that a feature of the class itself comes last.
    """
    if config.task == "typographic":
        hit, plain = (fires(sae, seen[name]).mean(0) for name in ("attacked", "clean"))
        usual = plain[plain > 0].median() if bool((plain > 0).any()) else 1.0
        return (hit - plain) / (plain + usual)
    f, clean = fires(sae, seen["clean"]), seen["clean"]

    def apart(by: Tensor) -> Tensor:
        one, two = f[by == 1], f[by == 0]
        spread = ((one.var(0) + two.var(0)) / 2).sqrt()
        return ((one.mean(0) - two.mean(0)) / (spread + 0.05 * spread.max())).abs()

    return apart(clean.other) - apart(clean.label)


def by_effect(base: Base, config: Config, layer: int, sae: SAE, seen: Mapping[str, Stream], by: LabelSet) -> Tensor:
    """(F,) what taking a feature away does to the log-probability of the true class, to first order.

    -f_j <W_j, gradient> summed over tokens, mean over pictures with what should not matter (attacked, or groups
    weighted alike) and over clean ones: a feature that the clean picture needs loses what it gains.
    """
    total = torch.zeros(len(sae.bias))
    for stream in seen.values():
        weight = torch.full((len(stream),), 1 / len(stream))
        if config.task in ("waterbirds", "celeba"):
            group = 2 * stream.label + stream.other
            weight = 1 / group.bincount(minlength=4).clamp_min(1)[group].float()
        for part, mine in zip(stream.parts(), torch.split(weight, 32), strict=True):
            x = part.x.detach().requires_grad_()
            with torch.enable_grad():
                right = finish(base, layer, part, x, by).log_softmax(1).gather(1, part.label[:, None])[:, 0]
                (slope,) = torch.autograd.grad((right * mine.to(right)).sum(), x)
            total -= (sae.encode(part.x) * (slope @ sae.decoder.T)).sum((0, 1)).cpu()
    return total


def lessons(
    base: Base, config: Config, layer: int, seen: Mapping[str, Stream], by: LabelSet
) -> tuple[list[Lesson], list[Lesson]]:
    """What gates are learned on: pictures with what should not matter (groups weigh by the base's errors), and clean
    ones that the base gets right, for what it gets wrong need not stay."""
    paired = config.task == "typographic"

    def some(stream: Stream, weight: Tensor, written: bool = False) -> list[Lesson]:
        size = config.gates.batch
        parts = zip(stream.parts(size), torch.split(weight, size), strict=True)
        return [
            Lesson(p.x, partial(finish, base, layer, p, by=by), p.label, w, p.other if written else None)
            for p, w in parts
        ]

    hard, clean = seen["attacked" if paired else "clean"], seen["clean"]
    weight = torch.ones(len(hard), device=hard.x.device)
    said = answers(base, layer, clean, by, lambda x: x).logits.argmax(1)
    right = said.to(clean.label) == clean.label
    if not paired:  # a group weighs what the base gets wrong of it, whatever its size
        group = 2 * hard.label + hard.other
        size, wrong = (group.bincount(w, minlength=4) for w in (torch.ones_like(weight), (~right).float()))
        weight = (wrong / size.clamp_min(1) ** 2)[group]
        weight = weight / weight.mean() if bool(weight.any()) else torch.ones_like(weight)
    kept = clean.rows(right.nonzero()[:, 0]) if bool(right.any()) else clean
    return some(hard, weight, paired), some(kept, torch.ones(len(kept), device=kept.x.device))


def alike(sae: SAE, stream: Stream, chosen: Sequence[int], seed: int) -> list[int]:
    """A control: for each chosen feature another one, the nearest in mean activation, ties drawn; none twice."""
    return tasks.alike(fires(sae, stream).mean(0).cpu(), chosen, seed)


def mean_direction(config: Config, site: str, seen: Mapping[str, Stream]) -> FeatureEdit:
    """A control without a dictionary: what stands out along the direction from one mean to the other is taken away."""
    clean = seen["clean"]
    if config.task == "typographic":
        one, two = seen["attacked"].x.mean((0, 1)), clean.x.mean((0, 1))
    else:
        one, two = (clean.x[clean.other == p].mean((0, 1)) for p in (1, 0))
    way = nnf.normalize(one - two, dim=0)[None]
    rank_one = SAE(way, -(way @ two), way, torch.zeros_like(two))
    return edit(rank_one, site, [0], "zero", tokens=config.tokens)


# ---- fitting -----------------------------------------------------------------------------------------------------


def dictionary(base: Base, config: Config, layer: int) -> tuple[SAE, list[dict[str, float]]]:
    """The dictionary of a layer and its training's curve: read if one is named, else trained on the train split."""
    site = clip.site(config.hook, layer)
    if config.dictionary:
        place = config.dictionary.replace("{layer}", str(layer))
        if not place.startswith("lab:"):
            return replace(load_sae(Path(place), config.device), site=site), []
        folder = clip.SHIPPED / slug(place.removeprefix("lab:"))
        manifest.read(folder, base=base.digest)
        shipped = load_sae(folder, config.device)
        if shipped.site != site:
            raise ConfigError(f"{place} was trained at {shipped.site}, not at {site}. Leave `layers` and `hook` alone.")
        return shipped, []
    mark = digest_of([asdict(config.sae), base.digest, site, config.which, config.task, config.data, config.chunk])
    checkpoint = home() / "checkpoints" / f"sae-{mark[:16]}.safetensors"
    chunks = activations(base.model, site, _stream(base, config), config.which)
    trained = train(config.sae, chunks, site, config.device, checkpoint, label=f"SAE of layer {layer}")
    checkpoint.unlink(missing_ok=True)
    return trained


def _stream(base: Base, config: Config) -> Callable[[int], Tensor]:
    """Chunk number -> pictures of the train split: half of the task's own world, a quarter each of single things and of
    crowds, so that the dictionary is not one of the task alone. Real data: the data set in another order each time."""
    main = {"steer": "imagenet"}.get(config.task, config.task)

    def chunk(number: int) -> Tensor:
        seed = 1000 + number
        if config.data:
            parts = [world(config, main, "train", config.chunk, seed, **_words(main, number))]
        else:
            shares = ((main, config.chunk // 2), ("imagenet", config.chunk // 4), ("coco", config.chunk // 4))
            parts = [world(config, w, "train", n, seed, **_words(w, number)) for w, n in shares]
        pictures = torch.cat([part.read(range(len(part))).image for part in parts])
        ready: Tensor = base.processor.image(pictures)
        return ready.to(base.device)

    return chunk


def _words(world: str, number: int) -> dict[str, str]:
    return {"word": ("wrong", "own", "none")[number % 3]} if world == "typographic" else {}


def fit(config: Config, folder: Path) -> Manifest:
    """Train the dictionaries, rank their features on train, choose on val, seal the best edit with its evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    main, *folds = (view(base, config, fold) for fold in ("", *config.folds))
    data, by = main.data, main.by
    report: dict[str, Any] = {"task": config.task, "layers": {}, "candidates": []}
    best: tuple[Offer, SAE] | None = None
    for layer in config.layers:
        sae, curve = dictionary(base, config, layer)
        tr, va = main.at("train", layer), main.at("val", layer)
        judge = partial(measure, base, config, layer, va, by["val"])
        plain = judge(None)
        elsewhere = [worths(base, config, layer, sae, one) for one in folds]
        offers: list[Offer] = []
        for row, patch in candidates(base, config, layer, sae, tr, by["train"]):
            others = [one.get(tuple(row.items()), -1.0) for one in elsewhere]  # -1: a fold offers none
            row |= (got := judge(patch)) | {"worth": fmean([worth(config, got, plain), *others])}
            row |= {"folds": dict(zip(config.folds, others, strict=True))} if others else {}
            report["candidates"].append(row)
            offers.append(Offer(patch, row, got.get(KEPT[config.task], 0.0)))
        mine = chosen(offers, config.within)
        about = {"curve": curve, "base": plain, **quality(base, layer, sae, va["clean"], by["val"])}
        if config.op != "add":
            control = random_control(sae, mine.patch, tr["clean"], config.seed)
            about["random"] = {"features": control.config.features, **judge(control)}
        if config.task != "steer":
            about["mean_direction"] = judge(mean_direction(config, clip.site(config.hook, layer), tr))
        if config.steer_features:
            about["steerability"] = steerable(base, config, layer, sae, va["clean"])
        report["layers"][str(layer)] = about
        if best is None or mine.score > best[0].score:
            best = mine, sae
    assert best is not None
    taken, sae = best
    patch, report["chosen"] = taken.patch, taken.row
    report["random"] = report["layers"][str(report["chosen"]["layer"])].get("random")
    va = main.at("val", report["chosen"]["layer"])
    _examples(base, config, data["val"], va, patch, by["val"], report, folder)
    save_sae(sae, folder / "sae")
    seal_labels(config, by["val"], folder)
    shown = data["train"].get("attacked", data["train"]["clean"])
    save_cards(cards.make(base, sae, patch.config.site, shown, shown.classes), folder)
    (folder / "report.json").write_bytes(canonical(json.loads(json.dumps(report))))
    return artifact.save(patch, "clip_sae", folder, base=base.label)


@dataclass(frozen=True)
class Offer:
    """A candidate as it was judged."""

    patch: FeatureEdit
    row: dict[str, Any]
    """of the report, `worth` among it"""
    kept: float
    """of what must stay"""

    @property
    def score(self) -> tuple[float, float]:
        """Of equals, what keeps most of what must stay is best."""
        return self.row["worth"], self.kept


def chosen(offers: Sequence[Offer], within: float) -> Offer:
    """The best, or of those within that of it the one with the fewest features, if the best keeps what must stay."""
    best = max(offers, key=lambda offer: offer.score)
    near = [offer for offer in offers if offer.score[0] > best.score[0] - within > 0]
    return min(near, key=lambda o: (len(o.patch.config.features), *(-x for x in o.score)), default=best)


@dataclass(frozen=True)
class View:
    """Train and val as one fold draws them: candidates are made from the one and judged on the other."""

    data: dict[str, dict[str, Dataset]]
    by: dict[str, LabelSet]
    seen: dict[str, dict[str, dict[int, Stream]]]

    def at(self, split: str, layer: int) -> dict[str, Stream]:
        return {k: s[layer] for k, s in self.seen[split].items()}


def view(base: Base, config: Config, fold: str = "") -> View:
    sizes = {"train": config.fit_images, "val": config.val_images}
    data = {split: pictures(config, split, n, fold) for split, n in sizes.items()}
    data["train"].pop("blank", None)  # a bound to be judged by, nothing to learn from
    by = {split: classifier(base, config, sets["clean"], fold=fold) for split, sets in data.items()}
    seen = {split: {k: streams(base, config, d) for k, d in sets.items()} for split, sets in data.items()}
    return View(data, by, seen)


def worths(base: Base, config: Config, layer: int, sae: SAE, one: View) -> dict[tuple[tuple[str, Any], ...], float]:
    """What each candidate of a layer is worth where another hand drew, by what it is."""
    judge = partial(measure, base, config, layer, one.at("val", layer), one.by["val"])
    plain, offered = judge(None), candidates(base, config, layer, sae, one.at("train", layer), one.by["train"])
    return {tuple(row.items()): worth(config, judge(patch), plain) for row, patch in offered}


def measure(
    base: Base,
    config: Config,
    layer: int,
    seen: Mapping[str, Stream],
    by: LabelSet,
    patch: FeatureEdit | None,
) -> dict[str, float]:
    """The task's metrics from streams, with the patch at the site they were recorded at."""
    change = applied(patch) if patch else lambda x: x
    return metrics(config, {k: answers(base, layer, s, by, change) for k, s in seen.items()})


def candidates(
    base: Base, config: Config, layer: int, sae: SAE, seen: Mapping[str, Stream], by: LabelSet
) -> Iterator[tuple[dict[str, Any], FeatureEdit]]:
    """The edits a layer offers, by ranking and number of features, from the train split alone."""
    top = _largest(sae, seen["clean"])
    mean = _mean(sae, seen["clean"]) if any(config.levels) else top
    gates = torch.ones_like(sae.bias)
    if "gates" in config.ranks and config.task != "steer":
        edited = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}[config.tokens]
        hard, kept = lessons(base, config, layer, seen, by)
        free = torch.ones_like(sae.bias, dtype=torch.bool)
        if config.gates.among:
            differ = by_difference(config, sae, seen).argsort(descending=True)
            free[differ[config.gates.among :]] = False
        gates = learn(config.gates, sae, hard, kept, edited, free, f"gates of layer {layer}")
    for how, order in orders(base, config, layer, sae, seen, by, gates).items():
        counts = [n for n in affordable(config.counts, len(sae.bias)) if n <= len(order)] or [len(order)]
        for count in tqdm(counts, f"layer {layer}, {how}", disable=None, leave=False):
            chosen, site = order[:count].tolist(), clip.site(config.hook, layer)
            row = {"layer": layer, "rank": how, "count": count}
            if how == "gates":
                for strength in config.strengths:
                    left = 1 - strength * (1 - gates[chosen])
                    yield {**row, "strength": strength}, edit(sae, site, chosen, "scale", left, config.tokens)
            elif config.op == "zero":
                for level in config.levels:
                    op: Op = "clamp" if level else "zero"
                    yield {**row, "level": level}, edit(sae, site, chosen, op, level * mean[chosen], config.tokens)
            else:
                value = config.value if config.op == "scale" else config.value * top[chosen]
                yield row, edit(sae, site, chosen, config.op, value, config.tokens)


def _largest(sae: SAE, stream: Stream) -> Tensor:
    """(F,) largest activation of each feature."""
    return torch.stack([sae.encode(part.x).amax((0, 1)) for part in stream.parts()]).amax(0)


def _mean(sae: SAE, stream: Stream) -> Tensor:
    """(F,) activation of each feature over tokens and pictures, every group (label, other) weighing alike."""
    group = 2 * stream.label + stream.other
    at = [(group == g).nonzero()[:, 0] for g in sorted(set(group.tolist()))]
    return torch.stack([fires(sae, stream.rows(i)).mean(0) for i in at]).mean(0) / stream.x.shape[1]


def random_control(sae: SAE, patch: FeatureEdit, stream: Stream, seed: int) -> FeatureEdit:
    """The same edit of as many other features of the same mass."""
    c = patch.config
    other = alike(sae, stream, c.features, seed)
    return edit(sae, c.site, other, c.op, patch.tensors.get("value", 0.0), c.tokens)


def orders(
    base: Base, config: Config, layer: int, sae: SAE, seen: Mapping[str, Stream], by: LabelSet, gates: Tensor
) -> dict[str, Tensor]:
    """ranking -> features, best first. To steer: those whose concept is the word, strongest first."""
    if config.task == "steer":
        clean = seen["clean"]
        top = config.value * _largest(sae, clean)
        got = steering(base, layer, clean, sae.decoder, sae.encode, top, by.weights.T)
        mine = (got.concept == int(clean.other[0])).nonzero()[:, 0]
        if not len(mine):
            raise ConfigError(f"No feature of layer {layer} steers to {config.word!r}. Take another word or layer.")
        return {"concept": mine[got.power[mine].argsort(descending=True)]}
    scores = {
        "difference": lambda: by_difference(config, sae, seen),
        "effect": lambda: by_effect(base, config, layer, sae, seen, by),
        "gates": lambda: 1 - gates,
    }
    return {how: scores[how]().argsort(descending=True) for how in config.ranks}


def steering(
    base: Base, layer: int, stream: Stream, rows: Tensor, code: Callable[[Tensor], Tensor], value: Tensor, words: Tensor
) -> Steerability:
    """Every direction of `rows` (F, D), whose activations are code(x) (..., F), clamped to `value` (F,)."""
    if layer == len(base.model.visual.transformer.resblocks) - 1:
        return after_last_block(base, stream.z[:, 0], rows, code(stream.x[:, 0]), value, words, quiet=False)
    f = code(stream.x)
    return after_block(base, layer, stream.z, rows, lambda at: f[..., at], value, words, quiet=False)


STEER_IMAGES = 16
"""pictures of the comparison with neurons"""


@torch.no_grad()
def steerable(
    base: Base, config: Config, layer: int, sae: SAE, stream: Stream
) -> dict[str, dict[str, dict[str, float]]]:
    """kind -> strength -> how many steer: features of a layer, the stream's own dimensions ("neurons"), and directions
    drawn at random, all set to the same values, multiples of the tokens' mean norm. As many of each as the config says
    are drawn.
    """
    names = readers.imagenet(config.data, "val").classes if config.data else atlas.load().names
    words = clip.embed_texts(base, names)
    few = next(stream.parts(STEER_IMAGES))
    g = torch.Generator().manual_seed(config.seed)
    alive = (_largest(sae, stream) > 0).nonzero()[:, 0]
    F = alive[torch.randperm(len(alive), generator=g)[: config.steer_features]]
    n, width = config.steer_features, stream.x.shape[-1]
    neurons = torch.eye(width)[torch.randperm(width, generator=g)[:n]].to(stream.x)
    drawn = nnf.normalize(torch.randn(n, width, generator=g), dim=1).to(stream.x)
    norm = float(stream.x.norm(dim=-1).mean())
    kinds: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "features": (sae.decoder[F], lambda x: sae.encode(x)[..., F]),
        "neurons": (neurons, lambda x: x @ neurons.T),
        "random": (drawn, lambda x: x @ drawn.T),
    }
    about = {"pictures": len(few), "words": len(names), "norm": norm}
    out: dict[str, dict[str, dict[str, float]]] = {}
    for kind, (rows, code) in kinds.items():
        size = {"of": len(alive) if kind == "features" else width}
        out[kind] = {}
        for strength in config.steer_strengths:
            value = torch.full((len(rows),), strength * norm).to(rows)
            got = steering(base, layer, few, rows, code, value, words)
            out[kind][f"{strength:g}"] = {**got.summary(), **about, **size}
    return out


@torch.no_grad()
def quality(base: Base, layer: int, sae: SAE, stream: Stream, by: LabelSet) -> dict[str, Any]:
    """How good a dictionary is on this stream: `Quality`, what as many principal components explain, and cross-entropy
    recovered between zero (the site is nothing) and clean, with the model's own logit scale."""
    seen = Quality(sae)
    for part in stream.parts():
        seen.add(part.x)
    out = seen.result()
    flat = stream.x.flatten(0, 1)[:: max(1, stream.x[..., 0].numel() // 8192)]
    out["principal_variance"] = principal_variance(flat, max(1, round(out["all"]["l0_mean"])))

    def loss(change: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        said = answers(base, layer, stream, by, change).logits
        return float(nnf.cross_entropy(said, stream.label.cpu())), said.argmax(1)

    (clean, before), (back, after) = loss(lambda x: x), loss(lambda x: sae.decode(sae.encode(x), x).to(x))
    zero, _ = loss(torch.zeros_like)
    out["ce"] = {"clean": clean, "sae": back, "zero": zero, "recovered": (zero - back) / (zero - clean)}
    out["top1_kept"] = share(before == after)
    return out


def _examples(
    base: Base, config: Config, data: Mapping[str, Dataset], seen: Mapping[str, Stream],
    patch: FeatureEdit, by: LabelSet, report: dict[str, Any], folder: Path, count: int = 8,
) -> None:  # fmt: skip
    """A few pictures of val with what the base and the patched model call them, for the figure."""
    name = "attacked" if config.task == "typographic" else "clean"
    s = seen[name]
    few, layer, classes = next(s.parts(count)), report["chosen"]["layer"], data[name].classes
    said = {
        side: [classes[i] for i in answers(base, layer, few, by, change).logits.argmax(1).tolist()]
        for side, change in (("base", lambda x: x), ("patched", applied(patch)))
    }
    report["examples"] = {**said, "is": [classes[i] for i in few.label.tolist()]}
    save_file({"image": data[name].read(range(len(few))).image.cpu().contiguous()}, folder / "examples.safetensors")


# ---- measuring a model -------------------------------------------------------------------------------------------


def evaluate(model: Subject, config: Config, arm: str | None) -> dict[str, float]:
    """The task's metrics on test, and for the lab's twins in the style no lab model was trained on (`_held`)."""
    return tasks.evaluate(model, config, arm)


# ---- pictures ----------------------------------------------------------------------------------------------------


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Candidates by layer and count, sparsity by position and token type, densities, examples, base beside patched."""
    from matplotlib.figure import Figure

    report = json.loads((folder / "report.json").read_text())
    goal = GOAL[report["task"]]
    out: dict[str, Any] = {}
    rows = report["candidates"]
    f = Figure(figsize=(7, 4.2), layout="constrained")
    a = f.subplots()

    def line(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["layer"], r["rank"], r.get("strength", 1.0), r.get("level", 0.0)

    for layer, how, much, left in sorted({line(r) for r in rows}):
        mine = [r for r in rows if line(r) == (layer, how, much, left)]
        label = f"layer {layer}, {how}" + (f" x {much:g}" if much != 1 else "") + (f", {left:g} left" if left else "")
        a.semilogx([r["count"] for r in mine], [r[goal] for r in mine], marker="o", label=label)
    base = next(iter(report["layers"].values()))["base"]
    a.axhline(base[goal], color="grey", linestyle=":", label="base")
    if report["random"]:
        a.plot(report["chosen"]["count"], report["random"][goal], "x", color="black", label="random features")
    if "blank" in base:
        a.axhline(base["blank"], color="grey", linestyle="--", label="strip without letters")
    a.set(title=f"Choosing on val: {goal.replace('_', ' ')}", xlabel="features", ylabel=goal.replace("_", " "))
    a.grid(alpha=0.25)
    a.legend(fontsize=7)
    out["candidates"] = f

    if len(report["layers"]) > 1:
        out["layers"] = _layers(report, goal)

    mine = report["layers"][str(report["chosen"]["layer"])]
    f = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = f.subplots(1, 2)
    patches = torch.tensor(mine["l0_map"][1:])
    side = int(len(patches) ** 0.5)
    shown = left.imshow(patches[: side * side].view(side, side).numpy(), cmap="viridis")
    f.colorbar(shown, ax=left, shrink=0.8)
    left.set(title=f"L0 by position (class token {mine['l0_map'][0]:.0f})", xticks=[], yticks=[])
    right.bar(BINS[:-1], mine["all"]["density"], width=BINS[1] - BINS[0], align="edge")
    right.set(title="Densities", xlabel="log10 of the share of tokens", ylabel="features")
    out["positions"] = f

    seen = load_file(folder / "examples.safetensors")["image"]
    f = Figure(figsize=(1.7 * len(seen), 2.5), layout="constrained")
    for i, a in enumerate(f.subplots(1, len(seen), squeeze=False)[0]):
        a.imshow(seen[i].permute(1, 2, 0).numpy())
        said = [report["examples"][side][i] for side in ("is", "base", "patched")]
        a.set_title("{}\nbase: {}\npatched: {}".format(*said), fontsize=7)
        a.axis("off")
    out["examples"] = f

    out["test"] = tasks.bars(results)
    return out


def _layers(report: Mapping[str, Any], goal: str) -> Any:
    """What each layer can do, how sparse its dictionary is per token type, and how many of its features steer."""
    from matplotlib.figure import Figure

    names = sorted(report["layers"], key=int)
    layers = [report["layers"][n] for n in names]
    ground = layers[0]["base"]
    best = []
    for name in names:
        rows = [r for r in report["candidates"] if str(r["layer"]) == name]
        best.append(max(rows, key=lambda r: r["worth"]))
    f = Figure(figsize=(11, 3.4), layout="constrained")
    panels = f.subplots(1, 3 if "steerability" in layers[0] else 2)
    a = panels[0]
    a.plot(names, [r[goal] for r in best], marker="o", color="C0", label="chosen features")
    for r, name in zip(best, names, strict=True):
        if r["worth"] < 0:  # hollow: no edit of this layer keeps what must stay
            a.plot(name, r[goal], "o", markerfacecolor="white", color="C0")
    a.plot(names, [x["random"][goal] for x in layers], marker=".", color="C7", label="random features")
    if "mean_direction" in layers[0]:
        a.plot(names, [x["mean_direction"][goal] for x in layers], marker=".", color="C1", label="mean direction")
    a.axhline(ground[goal], color="black", linestyle=":", label="base")
    if "blank" in ground:
        a.axhline(ground["blank"], color="black", linestyle="--", label="strip without letters")
    a.set(title=f"{goal.replace('_', ' ')}, val", xlabel="layer", ylim=(0, None))
    a.legend(fontsize=7)
    a = panels[1]
    for kind, label in (("cls", "class token"), ("patches", "patches"), ("all", "all")):
        a.plot(names, [x[kind]["l0_mean"] for x in layers], marker="o", label=label)
    a.set(title="features that fire per token", xlabel="layer", ylim=(0, None))
    a.legend(fontsize=7)
    if "steerability" in layers[0]:
        a = panels[2]
        strengths = list(layers[0]["steerability"]["features"])
        for i, kind in enumerate(("features", "neurons", "random")):
            for strength in strengths:
                shares = [x["steerability"][kind][strength]["steerable_share"] for x in layers]
                last = strength == strengths[-1]
                a.plot(names, shares, "o-" if last else ":", color=f"C{i}", label=kind if last else None)
        a.set(title=f"share that steers at {' (dotted), '.join(strengths)} norms", xlabel="layer", ylim=(0, 1))
        a.legend(fontsize=7)
    for a in panels:
        a.grid(alpha=0.25)
    return f


# ---- the whole table ---------------------------------------------------------------------------------------------

DEFENCE_PAIRS = 1024
"""pictures of train, with and without a word, that the other defences are fitted on"""


def report(folder: Path, out: Path, seed: int = 0, images: int = 0) -> dict[str, Any]:
    """A sealed patch, its controls, and for the typographic task other defences, on test and in the held style: every
    metric with its interval and n. docs/LOG.md's tables. Writes JSON as it goes. seed: of the test pictures, so that
    a patch made after a look at some can be measured on others; images: of them, 0 for the recipe's own number."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    assert isinstance(patch, FeatureEdit)
    fitted = json.loads((folder / "report.json").read_text())
    arms: dict[str, Defence | None] = {"base": None, "clip_sae": Defence(patch, about=fitted["chosen"])}
    if fitted["random"]:
        c, value = patch.config, patch.tensors.get("value", 0.0)
        sae = load_sae(folder / "sae", config.device)
        other = edit(sae, c.site, fitted["random"]["features"], c.op, value, c.tokens)
        arms["random features"] = Defence(other)
    results: dict[str, Any] = {"digest": about.digest, "recipe": sealed["recipe"], "seed": seed, "arms": {}}
    shown = replace(config, seed=seed, test_images=images or config.test_images)
    splits = ("test",) if config.data else ("test", "held")
    sets = {split: pictures(shown, split, shown.test_images) for split in splits}
    for name, defence in tqdm(chain(arms.items(), others(base, config)), "arms", disable=None):
        row: dict[str, Any] = {"about": dict(defence.about) if defence else {}}
        for split, mine in sets.items():
            with defence.patch.apply(base.model, defence.strength) if defence else nullcontext():
                by = classifier(base, config, mine["clean"], defence.templates if defence else clip.TEMPLATES, folder)
                said = {k: ask(base, config, d, by) for k, d in mine.items()}
            row[split] = {k: wilson(v) for k, v in outcomes(config, said).items()}
            if "average" in row[split]:
                row[split]["worst_group"] = min(v for k, v in row[split].items() if k != "average")
        results["arms"][name] = row
        out.write_text(json.dumps(results, indent=1))
        tqdm.write(f"{name}: {json.dumps(row)}")
    return results


def others(base: Base, config: Config) -> Iterator[tuple[str, Defence]]:
    """What else keeps CLIP from it, fitted on train and chosen on val at the same bound: the mean direction of the
    best layer, and for the typographic task the defences of training/clip_sae/defences.py."""
    if config.task == "steer":
        return
    layers = tuple(range(len(base.model.visual.transformer.resblocks)))
    config = replace(config, layers=layers, hook="block")
    sizes = {"train": config.fit_images, "val": config.val_images}
    sets = {split: pictures(config, split, n) for split, n in sizes.items()}
    by = classifier(base, config, sets["val"]["clean"])
    seen = {split: {k: streams(base, config, d) for k, d in part.items()} for split, part in sets.items()}
    best: tuple[float, FeatureEdit, dict[str, Any]] | None = None
    for layer in tqdm(layers, "mean direction", disable=None, leave=False):
        tr, va = ({k: s[layer] for k, s in seen[split].items()} for split in sizes)
        patch = mean_direction(config, clip.site("block", layer), tr)
        got = measure(base, config, layer, va, by, patch)
        score = worth(config, got, measure(base, config, layer, va, by, None))
        if best is None or score > best[0]:
            best = score, patch, {"layer": layer, **got}
    assert best is not None
    yield "mean direction", Defence(best[1], about=best[2])
    if config.task == "typographic":
        del seen
        fit_on = pictures(config, "train", DEFENCE_PAIRS)
        train = pairs(base, fit_on["clean"], fit_on["attacked"])
        val = pairs(base, sets["val"]["clean"], sets["val"]["attacked"])
        floor = judge(base, val, None).clean - config.bound
        for name, fitter in DEFENCES.items():
            start = time.monotonic()
            defence = fitter(base, train, val, floor)
            yield name, replace(defence, about={**defence.about, "seconds": round(time.monotonic() - start)})


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
