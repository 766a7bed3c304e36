"""Baseline defences against typographic attacks on CLIP, with which clip_sae is compared.

| name | source | fitted parameters |
|---|---|---|
| `dyslexify` | Dyslexify, arXiv 2508.20570 | which attention heads to zero at the class token |
| `prefix` | Defense-Prefix, arXiv 2304.04512 | one token embedding before the class name |
| `projection` | Materzynska et al., arXiv 2206.07835 | a projection of the image embedding |
| `interpolation` | PAINT, arXiv 2208.05592 | weight interpolation with a fine-tuned image tower |

All four are patches of the engine, fitted on the same train images. Their hyperparameter (number of heads, step, rank,
interpolation weight) is chosen on val by one rule: the highest attacked accuracy among settings that keep clean
accuracy above a floor. Sizes are for two cores and a minute or two each, so they train for few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from patches.engine.edits import Act, Edit, Inputs, Weight
from patches.engine.patch import Patch
from patches.engine.read import record
from patches.families import clip
from patches.families.base import Base
from patches.mechanisms.heads import HeadConfig, HeadEdit
from training.data.images import Dataset
from training.progress import tqdm
from training.tasks.recognition import Arm

STAR = "*"
"""Placeholder before a class name, whose embedding is the learned prefix"""


@dataclass(frozen=True)
class Pairs:
    """n images of one split, each without (clean) and with (attacked) another class's name written on it."""

    clean: Tensor
    """(n, 3, h, w) preprocessed images"""
    attacked: Tensor
    """(n, 3, h, w) preprocessed images with the writing"""
    y: tuple[Tensor, Tensor]
    """(n, k) the base's unit embeddings of clean and attacked images"""
    text: Tensor
    """(n, T - 1) bool: patches that the writing covers"""
    label: Tensor
    """(n,) index of the true class"""
    word: Tensor
    """(n,) index of the written class"""
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.label)

    def first(self, n: int) -> Pairs:
        y = self.y[0][:n], self.y[1][:n]
        return Pairs(self.clean[:n], self.attacked[:n], y, self.text[:n], self.label[:n], self.word[:n], self.classes)


def pairs(base: Base, clean: Dataset, attacked: Dataset) -> Pairs:
    """Read two data sets that differ only in the writing as pairs; locate the covered patches (`strip`)."""
    rows = range(len(clean))
    plain, hit = clean.read(rows), attacked.read(rows)
    cover = nnf.adaptive_avg_pool2d(hit.extras["strip"].float(), tuple(base.model.visual.grid_size)).flatten(1)
    x, z = (base.processor.image(part.image).to(base.device) for part in (plain, hit))
    y = clip.embed_images(base, x), clip.embed_images(base, z)
    return Pairs(x, z, y, cover > 0, plain.label, hit.extras["word_label"], clean.classes)


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] on clean and on attacked images."""

    clean: float
    attacked: float

    def worth(self, floor: float) -> float:
        """Return the selection score: attacked accuracy if clean accuracy reaches `floor`, else minus the shortfall."""
        return self.attacked if self.clean >= floor - 1e-9 else self.clean - floor


def score(p: Pairs, y: tuple[Tensor, Tensor], weights: Tensor) -> Score:
    """Compute the accuracy of classifier weights (k, C) on unit embeddings of clean and attacked images."""
    clean, attacked = (float(((e @ weights).argmax(1) == p.label).float().mean()) for e in y)
    return Score(clean, attacked)


def accuracies(base: Base, p: Pairs, d: Arm | None) -> Score:
    """Compute the accuracy of a defence (None: the base) on these pairs."""
    if d is None:
        return score(p, p.y, clip.zero_shot(base, p.classes))
    with d.on(base):
        y = clip.embed_images(base, p.clean), clip.embed_images(base, p.attacked)
        return score(p, y, clip.zero_shot(base, p.classes, d.templates))


# ---- Dyslexify: heads that look at letters -----------------------------------------------------------------------


def silence(heads: Sequence[tuple[int, int]], count: int) -> HeadEdit:
    """Build the edit that zeroes the output of these heads (of `count` a layer) at the class token alone."""
    return HeadEdit(HeadConfig(clip.SITES["heads"], tuple(heads), count, "zero", "cls"), {})


@torch.no_grad()
def looks_at_text(base: Base, p: Pairs) -> Tensor:
    """Compute, per head (L, H), the mean fraction of the class token's attention on patches with writing."""
    layers = len(base.model.visual.transformer.resblocks)
    sites = [clip.site("pattern", layer) for layer in range(layers)]
    with record(base.model, sites, keep=lambda a: a[:, :, 0, 1:]) as acts:
        clip.embed_images(base, p.attacked)
    text = p.text[:, None].float()
    shares = [(a := torch.cat(acts[s])).mul(text).sum(-1) / a.sum(-1) for s in sites]  # (n, H) each
    return torch.stack([s.mean(0) for s in shares])


def dyslexify(
    base: Base,
    train: Pairs,
    val: Pairs,
    floor: float,
    gain: float = 0.001,
    drop: float = 0.01,
    skips: int = 10,
    images: int = 192,
) -> Arm:
    """Fit Dyslexify: zero heads in order of `looks_at_text`.

    A head that gains less than `gain` of attacked train accuracy is skipped; stop at a clean drop above `drop` or more
    than `skips` skips in a row. Then drop the last heads until val clean accuracy reaches `floor`.
    """
    train = train.first(images)
    looks = looks_at_text(base, train)
    count = looks.shape[1]
    order = [divmod(int(i), count) for i in looks.flatten().argsort(descending=True)]
    first = now = accuracies(base, train, None)
    kept: list[tuple[int, int]] = []
    skipped = 0
    for head in tqdm(order, "dyslexify", disable=None, leave=False):
        got = accuracies(base, train, Arm(silence((*kept, head), count)))
        if first.clean - got.clean > drop:
            break
        if got.attacked - now.attacked < gain:
            skipped += 1
            if skipped > skips:
                break
            continue
        kept, now, skipped = [*kept, head], got, 0
    about = {"heads": kept, "looks": [round(float(looks[h]), 4) for h in kept], "order": order[:16], "train": vars(now)}
    while kept:
        d = Arm(silence(kept, count), about={**about, "heads": list(kept)})
        if accuracies(base, val, d).worth(floor) >= 0:
            return d
        kept.pop()
    nothing = silence([order[0]], count)  # at strength 0, the base: no setting keeps the floor
    return Arm(nothing, 0.0, about={**about, "heads": []})


# ---- Defense-Prefix: a learned token before the class name -------------------------------------------------------


@dataclass(frozen=True)
class PrefixConfig:
    """Token that Defense-Prefix replaces."""

    token: int
    """Id of STAR in the base's vocabulary; its embedding is replaced"""


@dataclass(frozen=True)
class Prefix(Patch):
    """Patch that replaces STAR's token embedding. tensors: vector (D,), its embedding in the text tower."""

    Config = PrefixConfig
    config: PrefixConfig

    def edits(self) -> list[Edit]:
        def fn(x: Tensor, inputs: Inputs) -> Tensor:  # (B, T, D)
            here = (inputs["text"] == self.config.token)[..., None]
            return torch.where(here, self.tensors["vector"].to(x), x)

        return [Act(clip.site("embed", tower="text"), fn)]


def prefix(
    base: Base,
    train: Pairs,
    val: Pairs,
    floor: float,
    steps: int = 160,
    batch: int = 24,
    lr: float = 3e-3,
    weights: tuple[float, float] = (1.0, 3.0),
    every: int = 20,
    seed: int = 0,
) -> Arm:
    """Fit Defense-Prefix: cross-entropy on attacked images plus KL to the base's prediction on clean ones.

    The two terms are weighted 1 and 3, as published.

    The classes of a step are those that its images show or read. Trained by Adam, because steps are few; val chooses
    the step.
    """
    templates = tuple(t.replace("{}", f"{STAR} {{}}") for t in clip.TEMPLATES)
    token = int(base.processor.text([STAR])[0, 1])
    scale, g = clip.logit_scale(base), torch.Generator().manual_seed(seed)
    (clean, attacked), plain = train.y, clip.zero_shot(base, train.classes)
    used = torch.unique(base.processor.text([t.format(c) for t in clip.TEMPLATES for c in train.classes]))
    start = base.model.token_embedding.weight[used.to(base.device)].detach().float().mean(0)
    vector = nn.Parameter(start.clone())
    patch = Prefix(PrefixConfig(token), {"vector": vector})
    opt = torch.optim.Adam([vector], lr=lr)
    best: tuple[float, Tensor, dict[str, Any]] | None = None
    with patch.apply(base.model):
        for step in tqdm(range(steps + 1), "prefix", disable=None, leave=False):
            if step % every == 0:
                got = score(val, val.y, clip.zero_shot(base, val.classes, templates))
                if best is None or got.worth(floor) > best[0]:
                    best = got.worth(floor), vector.detach().clone(), {"step": step, "val": vars(got)}
            rows = torch.randint(len(train), (batch,), generator=g)
            shown, label = torch.unique(torch.cat([train.label[rows], train.word[rows]]), return_inverse=True)
            template = templates[int(torch.randint(len(templates), (), generator=g))]
            texts = base.processor.text([template.format(train.classes[i]) for i in shown.tolist()])
            with torch.enable_grad():
                T = base.model(text=texts.to(base.device))["text_features"].T  # (k, c)
                right = nnf.cross_entropy(scale * attacked[rows] @ T, label[:batch])
                was = (scale * clean[rows] @ plain[:, shown]).log_softmax(1)
                now = (scale * clean[rows] @ T).log_softmax(1)
                kept = nnf.kl_div(now, was, log_target=True, reduction="batchmean")
                loss = weights[0] * right + weights[1] * kept
                vector.grad = torch.autograd.grad(loss, vector)[0]
            opt.step()
    assert best is not None
    return Arm(Prefix(PrefixConfig(token), {"vector": best[1]}), templates=templates, about=best[2])


# ---- Materzynska et al.: a projection of the image embedding -----------------------------------------------------


@dataclass(frozen=True)
class ProjectionConfig:
    """Config of the projection patch, which has no options."""


@dataclass(frozen=True)
class Projection(Patch):
    """Patch that projects the image embedding y to y W W^T before the base normalises it. tensors: basis W (k, r)."""

    Config = ProjectionConfig
    config: ProjectionConfig

    def edits(self) -> list[Edit]:
        W = self.tensors["basis"]
        return [Act("visual", lambda y, _: y @ W.to(y) @ W.T.to(y))]

    def weights(self) -> list[Weight]:
        W = self.tensors["basis"]
        return [Weight("visual", lambda p: {"proj": p["proj"] @ (W @ W.T).to(p["proj"])})]


def projection(
    base: Base,
    train: Pairs,
    val: Pairs,
    floor: float,
    ranks: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0),
    stays: Sequence[float] = (0.1, 1.0, 10.0),
    steps: int = 200,
    every: int = 20,
    lr: float = 2e-3,
) -> Arm:
    """Fit the projection: cross-entropy on clean and attacked images, plus `stays` * |W^T W - I|^2.

    The second term keeps W near a projection. W starts at the principal directions of images and class names; val
    chooses rank, weight and step.
    """
    scale = clip.logit_scale(base)
    (clean, attacked) = train.y
    plain, names = clip.zero_shot(base, train.classes), clip.zero_shot(base, val.classes)
    main = torch.linalg.svd(torch.cat([clean, plain.T]), full_matrices=True).Vh
    best: tuple[float, Tensor, dict[str, Any]] | None = None
    tried = [(r, s) for r in ranks for s in stays]
    for share, stay in tqdm(tried, "projection", disable=None, leave=False):
        W = nn.Parameter(main[: max(1, round(share * len(main)))].T.contiguous())  # (k, r)
        opt = torch.optim.Adam([W], lr=lr)
        for step in range(steps + 1):
            if step % every == 0:
                with torch.no_grad():
                    a, b = (nnf.normalize(y @ W @ W.T, dim=1) for y in val.y)
                    got = score(val, (a, b), names)
                if best is None or got.worth(floor) > best[0]:
                    about = {"rank": W.shape[1], "stay": stay, "step": step, "val": vars(got)}
                    best = got.worth(floor), W.detach().clone(), about
            with torch.enable_grad():
                y = nnf.normalize(torch.cat([clean, attacked]) @ W @ W.T, dim=1)
                right = nnf.cross_entropy(scale * y @ plain, train.label.repeat(2))
                away = (W.T @ W - torch.eye(W.shape[1], device=W.device)).square().sum()
                W.grad = torch.autograd.grad(right + stay * away, W)[0]
            opt.step()
    assert best is not None
    return Arm(Projection(ProjectionConfig(), {"basis": best[1]}), about=best[2])


# ---- PAINT: interpolate weights with fine-tuned ones -------------------------------------------------------------


@dataclass(frozen=True)
class TunedConfig:
    """Config of the interpolation patch; the interpolation weight is the strength at which it is applied."""


@dataclass(frozen=True)
class Tuned(Patch):
    """Patch that interpolates weights: at strength a, (1 - a) times the base's and a times these.

    tensors: name -> fine-tuned value.
    """

    Config = TunedConfig
    config: TunedConfig

    def edits(self) -> list[Edit]:
        sites: dict[str, dict[str, Tensor]] = {}
        for name, value in self.tensors.items():
            site, _, own = name.rpartition(".")
            sites.setdefault(site, {})[own] = value
        return [Weight(site, partial(_these, own)) for site, own in sites.items()]


def _these(own: dict[str, Tensor], _: dict[str, Tensor]) -> dict[str, Tensor]:
    return own


def interpolation(
    base: Base,
    train: Pairs,
    val: Pairs,
    floor: float,
    steps: int = 60,
    batch: int = 24,
    lr: float = 5e-5,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> Arm:
    """Fit PAINT: fine-tune the image tower on attacked train images under the base's own classifier.

    Val chooses the interpolation weight among `shares`.
    """
    scale, names = clip.logit_scale(base), clip.zero_shot(base, train.classes)
    model = deepcopy(base.model)
    tower = model.visual.requires_grad_(True)
    opt = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=0.1)
    for part in tqdm(_shuffled(len(train), batch, steps, seed), "interpolation", steps, disable=None, leave=False):
        with torch.enable_grad():
            y = nnf.normalize(tower(train.attacked[part]), dim=1)
            loss = nnf.cross_entropy(scale * y @ names, train.label[part])
            grads = torch.autograd.grad(loss, list(tower.parameters()))
        for p, grad in zip(tower.parameters(), grads, strict=True):
            p.grad = grad
        opt.step()
    tuned = Tuned(TunedConfig(), {f"visual.{k}": p.detach() for k, p in tower.named_parameters()})
    got = {a: accuracies(base, val, Arm(tuned, a)) for a in shares}
    best = max(shares, key=lambda a: got[a].worth(floor))
    about = {"share": best, "steps": steps, "val": {str(a): vars(s) for a, s in got.items()}}
    return Arm(tuned, best, about=about)


def _shuffled(n: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of row indices; every row is used once before any is used again."""
    g = torch.Generator().manual_seed(seed)
    rows: Tensor = torch.zeros(0, dtype=torch.long)
    for _ in range(steps):
        if len(rows) < batch:
            rows = torch.cat([rows, torch.randperm(n, generator=g)])
        yield rows[:batch]
        rows = rows[batch:]


DEFENCES: dict[str, Callable[[Base, Pairs, Pairs, float], Arm]] = {
    "dyslexify": dyslexify, "prefix": prefix, "projection": projection, "interpolation": interpolation,
}  # fmt: skip
