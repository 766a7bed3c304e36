"""second_order: what CLIP's neurons say through later attention, in words; and patches that take some of it away.

Paper: Gandelsman, Efros, Steinhardt, "Interpreting the second-order effects of neurons in CLIP", arXiv 2406.04341.
Claim: the second-order effects of a neuron lie along one direction (48 % of their variance for ViT-B/32, layer 9),
count for fewer than 2 % of pictures, and name it: a sparse sum of texts finds attributes, masks and spurious words.

    patchbay fit second_order/tiny       # a random tower: seconds on a CPU
    patchbay fit second_order/lab        # written words out of lab:clip, layers 4 to 6: minutes on 2 cores
    patchbay fit second_order/paper data=/folder/of/imagenet pool=words.txt    # ViT-B/32, layers 8 to 10
    python -m training.second_order FOLDER REPORT.json    # on test: arms, masks, pictures that mislead

Of each layer: directions, thresholds and texts of all its neurons on pictures of the train split; neurons ranked there
by what they add to the wrong class where something that should not matter is in the picture; what becomes of them
(effects, or the activation itself, at their mean over clean pictures), how many and of which layer is chosen on val,
among what costs no more than `bound`. A control takes as many other neurons of the same spread. Nothing is chosen on
test. The paper's open questions are answered beside it, on val: how much one direction explains, what holding attention
and norms still costs, which heads carry a neuron (`report.json`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from patches import artifact
from patches.engine.read import record
from patches.evidence.label_set import LabelSet
from patches.evidence.neuron_cards import Layer, NeuronCards, Reader, load_neurons, save_neurons
from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip.second_order import (
    MOVES,
    Directions,
    Moments,
    Moves,
    NeuronLens,
    Norms,
    Replacement,
    follow,
    lens,
    look,
    replaced,
    scalars,
)
from patches.mechanisms.neurons import NeuronEdit, ablate, replace_effects
from registry import config as configs
from registry.config import STRICT
from registry.manifest import Manifest, canonical
from training.data.images import Dataset
from training.lab import atlas
from training.lab.renderer import GROUNDS
from training.second_order.misleading import attack
from training.second_order.omp import AtomNorm, atoms, pursue
from training.tasks import recognition as tasks
from training.tasks import segmentation
from training.tasks.intervals import wilson
from training.tasks.recognition import (
    GOAL,
    Answers,
    Classifier,
    Task,
    affordable,
    ask,
    classifier,
    evaluate,
    metrics,
    other_of,
    outcomes,
    pictures,
    seal_labels,
    world,
    worth,
)
from training.tasks.textspan import read_pool

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]  # evaluate is the tasks' own

Edit = Literal["effects", "activations"]
REPLACEMENTS: tuple[Replacement, ...] = ("mean", "significant", "insignificant", "rank1")


@dataclass(frozen=True)
class Config:
    """What to read, what to take away, and how to measure it."""

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
    word: str = ""
    """of the task steer, which this system does not fit"""
    layers: tuple[int, ...] = (4, 5, 6)
    """whose neurons are read, 0-based; all but the last one have second-order effects"""
    ln: Norms = "own"
    """own: exactly linear; official: the centring of the authors' code, for parity"""
    share: float = 0.02
    """of the pictures, those of the largest effects, from which a neuron's direction is taken and its threshold set"""
    pool: str = ""
    """.txt of texts, one a line; empty: the lab's names and grounds, or the classes of `data`"""
    atoms: int = 16
    """texts per neuron"""
    atom_norm: AtomNorm = "unit"
    edits: tuple[Edit, ...] = ("effects", "activations")
    """what is taken away: second-order effects alone, or what the neuron fires"""
    counts: tuple[int, ...] = (25, 100, 300)
    """of neurons"""
    bound: float = 0.01
    """clean accuracy (typographic) or average accuracy (groups) that an edit may cost on val"""
    fit_images: int = 1000
    """that directions are taken from"""
    rank_images: int = 384
    """of the task, that neurons are ranked on; each with and without what should not matter"""
    val_images: int = 256
    test_images: int = 500
    probes: int = 24
    """neurons whose true path is followed, and as many pictures"""


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", layers=(0, 1), atoms=4, counts=(4, 32), fit_images=40, rank_images=16, val_images=16,
        test_images=16, share=0.1, probes=3,
    ),
    "lab": Config(counts=(50, 200), fit_images=800, rank_images=256, val_images=160),
    "demo": Config(
        layers=(5,), counts=(100,), edits=("activations",), fit_images=300, rank_images=128, val_images=96,
        test_images=100, probes=8,
    ),
    "waterbirds": Config(task="waterbirds", bound=0.02),
    "celeba": Config(task="celeba", bound=0.02),
    "paper": Config(
        base="open-clip:ViT-B-32/openai", device="cuda", layers=(8, 9, 10), atoms=128, fit_images=5124,
        rank_images=2000, val_images=2000, test_images=10_000,
    ),
}  # fmt: skip


# ---- reading -----------------------------------------------------------------------------------------------------


def sources(config: Config) -> list[Dataset]:
    """What directions are taken from: pictures of train, of the task with and without what should not matter, and of
    single things and crowds, so that neurons are not read by the task alone. Real data: the data set itself."""
    if config.data:
        return list(_of_task(config, "train", config.fit_images).values())
    own = list(_of_task(config, "train", max(1, config.fit_images // 4)).values())
    left = max(2, config.fit_images - sum(map(len, own)))
    return [*own, world(config, "imagenet", "train", left - left // 2), world(config, "coco", "train", left // 2)]


def _of_task(config: Config, split: str, n: int) -> dict[str, Dataset]:
    """The task's sets, but for the strip without letters, of which nothing is learned."""
    return {k: d for k, d in pictures(config, split, n).items() if k != "blank"}


def texts_of(config: Config, data: Dataset) -> tuple[str, ...]:
    """The pool: a file's lines, the classes of real data, or every name and ground of the lab."""
    if config.pool:
        return read_pool(config.pool)
    return data.classes if config.data else tuple(dict.fromkeys([*atlas.load().names, *GROUNDS]))


def batches(data: Sequence[Dataset], size: int = 32) -> Iterator[Tensor]:
    """(B, 3, H, W) uint8 of all sets, in order."""
    for each in data:
        for batch in each.batches(size):
            yield batch.image


@torch.no_grad()
def read(
    base: Base, config: Config, texts: Sequence[str], thumb: int = 48
) -> tuple[NeuronCards, dict[int, NeuronLens]]:
    """Cards of all neurons of the config's layers, in one pass over the pictures."""
    lenses = {layer: lens(base, layer, config.ln) for layer in config.layers}
    data = sources(config)
    keep = max(1, round(config.share * sum(map(len, data))))
    moments = {layer: Moments(at, keep) for layer, at in lenses.items()}
    fired = {layer: torch.zeros(at.neurons, device=base.device) for layer, at in lenses.items()}
    thumbs = []
    bar = tqdm(batches(data), "second-order effects", total=sum(-(-len(d) // 32) for d in data), disable=None)
    for images in bar:
        seen = look(base, base.processor.image(images), config.layers)
        for layer, each in moments.items():
            each.add(scalars(seen, layer))
            fired[layer] += seen.p[layer].mean(1).sum(0)
        small = nnf.interpolate(images.float().cpu(), (thumb, thumb), mode="bilinear", antialias=True)
        thumbs.append(small.round().clamp(0, 255).to(torch.uint8))
    pool = clip.embed_texts(base, texts, clip.TEMPLATES)
    dictionary = atoms(pool, config.atom_norm)
    layers = {}
    for layer, each in moments.items():
        known = each.result()
        said = pursue(known.direction, dictionary, min(config.atoms, *dictionary.shape))
        rest = fired[layer] / known.seen
        layers[layer] = Layer(known, said.index, said.coefficient, said.explained[:, -1], rest)
    return NeuronCards(layers, tuple(texts), pool, torch.cat(thumbs), config.ln), lenses


# ---- which neurons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """What one layer's neurons do to the task, on train."""

    order: Tensor
    """(N,) int64, what pulls most to the wrong side first"""
    pull: Tensor
    """(N,)"""
    effect_mean: Tensor
    """(N, G) of S over clean pictures"""
    fire_mean: Tensor
    """(N,) of activations over clean pictures and tokens"""


@dataclass(frozen=True)
class Margins:
    """What every neuron adds to the wrong side in each of n pictures, and what it is on average."""

    m: dict[int, Tensor]
    """layer -> (n, N): <phi_n, t_wrong - t_true> / |y|; of groups <phi_n, t_1 - t_0> / |y|"""
    label: Tensor
    other: Tensor
    effect: dict[int, Tensor]
    """layer -> (N, G) mean of S"""
    fire: dict[int, Tensor]
    """layer -> (N,) mean activation over pictures and tokens"""


@torch.no_grad()
def margins(
    base: Base,
    config: Config,
    lenses: Mapping[int, NeuronLens],
    data: Dataset,
    weights: Tensor,
    other: Tensor | None = None,
) -> Margins:
    """weights (k, C), one direction a class. other: (n,) the wrong class of each picture, where the pictures themselves
    do not show it."""
    says = {layer: at.against(weights.T) for layer, at in lenses.items()}  # (N, G, C)
    m: dict[int, list[Tensor]] = {layer: [] for layer in lenses}
    effect: dict[int, Tensor] = {}
    fire: dict[int, Tensor] = {}
    labels, others, done = [], [], 0
    for batch in data.batches(32):
        seen = look(base, base.processor.image(batch.image), list(lenses))
        wrong = other_of(config, data, batch) if other is None else other[done : done + len(batch)]
        done += len(batch)
        for layer, say in says.items():
            s = scalars(seen, layer)  # (B, G, N)
            if config.task == "typographic":
                apart = (say[..., wrong] - say[..., batch.label]).permute(2, 1, 0)  # (B, G, N)
            else:
                apart = (say[..., 1] - say[..., 0]).T
            m[layer].append((s * apart).sum(1) / seen.y.norm(dim=1)[:, None])
            effect[layer] = effect.get(layer, torch.zeros(())).to(s) + s.sum(0).T
            fire[layer] = fire.get(layer, torch.zeros(())).to(s) + seen.p[layer].mean(1).sum(0)
        labels.append(batch.label)
        others.append(wrong)
    n = len(data)
    return Margins(
        {layer: torch.cat(v) for layer, v in m.items()}, torch.cat(labels), torch.cat(others),
        {layer: v / n for layer, v in effect.items()}, {layer: v / n for layer, v in fire.items()},
    )  # fmt: skip


def rank(
    base: Base, config: Config, lenses: Mapping[int, NeuronLens], data: Mapping[str, Dataset]
) -> dict[int, Ranked]:
    """Neurons by how much more of the wrong answer they add where something that should not matter is in the picture.

    Pairs (clean, attacked): the mean margin of attacked pictures less that of the same ones clean, both against the
    word that is written. Groups: how far mean margins lie apart by place, less how far by label.
    """
    weights = classifier(base, config, data["clean"]).directions
    if config.task == "typographic":
        hit = margins(base, config, lenses, data["attacked"], weights)
        clean = margins(base, config, lenses, data["clean"], weights, hit.other)
        pull = {layer: hit.m[layer].mean(0) - clean.m[layer].mean(0) for layer in lenses}
    else:
        clean = margins(base, config, lenses, data["clean"], weights)

        def apart(m: Tensor, by: Tensor) -> Tensor:
            return (m[by == 1].mean(0) - m[by == 0].mean(0)).abs()

        pull = {layer: apart(m, clean.other) - apart(m, clean.label) for layer, m in clean.m.items()}
    return {
        layer: Ranked(p.argsort(descending=True), p, clean.effect[layer], clean.fire[layer])
        for layer, p in pull.items()
    }


def alike(known: Directions, chosen: Sequence[int], seed: int) -> list[int]:
    """A control: for each chosen neuron another one, the nearest in spread of its effects, ties drawn; none twice."""
    return tasks.alike(known.spread.cpu(), chosen, seed)


def patch_of(
    base: Base, layer: int, at: NeuronLens, known: Directions, found: Ranked, neurons: Sequence[int], edit: Edit
) -> NeuronEdit:
    """These neurons at their mean over clean pictures of train."""
    js = list(neurons)
    if edit == "effects":
        return replace_effects(base, at, replace(known, mean=found.effect_mean), js)
    return ablate(clip.site("neurons", layer), js, found.fire_mean[js].clone())


# ---- the paper's open questions ----------------------------------------------------------------------------------


@torch.no_grad()
def ablations(base: Base, cards: NeuronCards, lenses: Mapping[int, NeuronLens], data: Dataset, weights: Tensor) -> Any:
    """Zero-shot accuracy when the effects of a whole layer are replaced (section 4 of the paper), layer by layer; and
    for how many pictures an effect counts."""
    right: dict[int, dict[str, int]] = {layer: dict.fromkeys(REPLACEMENTS, 0) for layer in lenses}
    base_right, counted = 0, dict.fromkeys(lenses, 0.0)
    for batch in data.batches(32):
        seen = look(base, base.processor.image(batch.image), list(lenses))
        label = batch.label.to(seen.y.device)
        base_right += int(((seen.y @ weights).argmax(1) == label).sum())
        for layer, at in lenses.items():
            known, s = cards.layers[layer].known, scalars(seen, layer)
            counted[layer] += float(known.significant(known.centred(at, s)).float().mean(0).sum())
            for how in REPLACEMENTS:
                y = seen.y + replaced(at, known, s, how)
                right[layer][how] += int(((y @ weights).argmax(1) == label).sum())
    n = len(data)
    share = {str(k): {**{how: c / n for how, c in v.items()}, "counts_share": counted[k] / n} for k, v in right.items()}
    return {"base": base_right / n, "n": n, "layers": share}


@torch.no_grad()
def linearisation(
    base: Base, cards: NeuronCards, at: NeuronLens, images: Tensor, neurons: Sequence[int]
) -> dict[str, Any]:
    """How far phi is from what mean-ablating the neuron does, as what the lens holds still is let go one by one.

    Per step: |phi - change|^2 over |change|^2, both about the neuron's mean activation, summed over neurons and
    pictures; their cosine, mean over both; the share of the final change's energy that the step has.
    """
    layer = at.layer
    rest = cards.layers[layer].rest
    x = base.processor.image(images)
    with (
        record(base.model, [clip.site("block", layer)]) as z,
        record(base.model, [clip.site("neurons", layer)], "input") as p,
    ):
        clip.embed_images(base, x, batch=len(x))
    stream, fire = z[clip.site("block", layer)][0].float(), p[clip.site("neurons", layer)][0].float()
    w = base.model.visual.transformer.resblocks[layer].mlp.c_proj.weight.float()
    steps: list[tuple[str, tuple[Moves, ...]]] = [("lens", ())]
    steps += [(m, MOVES[: i + 1]) for i, m in enumerate(MOVES)]
    got: dict[str, list[Tensor]] = {name: [] for name, _ in steps}
    for n in tqdm(neurons, f"paths of layer {layer}", disable=None, leave=False):
        delta = (rest[n] - fire[..., n])[..., None] * w[:, n]  # mean-ablation of one neuron at every token
        for name, moves in steps:
            got[name].append(follow(base, layer, stream, delta, moves))
    phi = torch.stack(got["lens"])
    last = torch.stack(got[steps[-1][0]]).square().sum()
    out = {}
    for name, _ in steps[1:]:
        true = torch.stack(got[name])
        out[name] = {
            "error": float((phi - true).square().sum() / true.square().sum()),
            "cosine": float(nnf.cosine_similarity(phi, true, dim=-1).mean()),
            "energy": float(true.square().sum() / last),
        }
    return {
        "steps": out,
        "neurons": len(neurons),
        "pictures": len(images),
        "lens_energy": float(phi.square().sum() / last),
    }


def questions(base: Base, config: Config, cards: NeuronCards, lenses: Mapping[int, NeuronLens]) -> dict[str, Any]:
    """Per layer: how much one direction explains, what the lens leaves out, who carries what. Pictures of val."""
    images = world(config, _plain(config), "val", config.val_images)
    weights = clip.zero_shot(base, images.classes)
    out: dict[str, Any] = {"ablations": ablations(base, cards, lenses, images, weights), "layers": {}}
    g = torch.Generator().manual_seed(config.seed)
    few = images.read(range(min(len(images), config.probes))).image
    for layer, at in lenses.items():
        one = cards.layers[layer]
        known = one.known
        heavy = known.spread.topk(min(config.probes, at.neurons)).indices.tolist()
        drawn = torch.randperm(at.neurons, generator=g)[: config.probes].tolist()
        main = known.carriers.amax(1)
        out["layers"][str(layer)] = {
            "directions": known.axis.shape[1],
            "explained": _summary(known.explained[:, 0]),
            "explained_all": _summary(known.explained_all),
            "texts_explain": _summary(one.told),
            "proved": float(known.exact.float().mean()),
            "main_carrier": _summary(main),
            "carried_by": known.carriers.mean(0).view(-1, at.heads).tolist(),
            "paths": {
                "heavy": linearisation(base, cards, at, few, heavy),
                "random": linearisation(base, cards, at, few, drawn),
            },
        }
    return out


def _plain(config: Config) -> str:
    """The world of clean pictures that zero-shot accuracy is asked in."""
    return "imagenet" if not config.data or config.task in ("typographic", "steer") else config.task


BINS = 20


def _summary(x: Tensor) -> dict[str, Any]:
    """Mean, quartiles and a histogram over neurons of shares between 0 and 1."""
    x = x.float().cpu().clamp(0, 1)
    quartiles = [round(float(v), 4) for v in x.quantile(torch.tensor([0.25, 0.5, 0.75]))]
    return {"mean": round(float(x.mean()), 4), "quartiles": quartiles, "histogram": x.histc(BINS, 0, 1).long().tolist()}


# ---- fitting -----------------------------------------------------------------------------------------------------


def fit(config: Config, folder: Path) -> Manifest:
    """Read the neurons, rank them on train, choose on val, seal the edit with the cards and the evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    train = _of_task(config, "train", config.rank_images)
    val = pictures(config, "val", config.val_images)
    by = classifier(base, config, val["clean"])
    cards, lenses = read(base, config, texts_of(config, train["clean"]))
    found = rank(base, config, lenses, train)
    report: dict[str, Any] = {"task": config.task, "candidates": [], "base": _judge(base, config, val, by, None)}
    best: tuple[float, NeuronEdit, dict[str, Any]] | None = None
    for layer, edit, count in candidates(config, lenses):
        js = found[layer].order[:count].tolist()
        patch = patch_of(base, layer, lenses[layer], cards.layers[layer].known, found[layer], js, edit)
        got = _judge(base, config, val, by, patch)
        row: dict[str, Any] = {
            "layer": layer,
            "edit": edit,
            "count": count,
            **got,
            "worth": worth(config, got, report["base"]),
        }
        report["candidates"].append(row)
        if best is None or row["worth"] > best[0]:
            best = row["worth"], patch, row
    assert best is not None
    _, patch, chosen = best
    layer, known = chosen["layer"], cards.layers[chosen["layer"]].known
    report["chosen"] = chosen
    other = alike(known, patch.config.neurons, config.seed)
    control = patch_of(base, layer, lenses[layer], known, found[layer], other, chosen["edit"])
    report["random"] = {"neurons": other, **_judge(base, config, val, by, control)}
    save_file({k: v.cpu().contiguous() for k, v in control.tensors.items()}, folder / CONTROL)
    report["questions"] = questions(base, config, cards, lenses)
    _examples(base, config, val, by, patch, report, folder)
    save_neurons(cards, folder)
    seal_labels(config, by, folder)
    (folder / "report.json").write_bytes(canonical(json.loads(json.dumps(report))))
    return artifact.save(patch, "second_order", folder, base=base.label)


CONTROL = "control.safetensors"
"""the control's tensors, so that it can be measured on test as it was on val"""


def candidates(config: Config, lenses: Mapping[int, NeuronLens]) -> Iterator[tuple[int, Edit, int]]:
    """(layer, edit, number of neurons); a control takes as many others."""
    rows = [
        (layer, edit, n)
        for layer, at in lenses.items()
        for edit in config.edits
        for n in affordable(config.counts, at.neurons)
    ]
    yield from tqdm(rows, "candidates", disable=None, leave=False)


def _judge(
    base: Base, config: Config, data: Mapping[str, Dataset], by: LabelSet, patch: NeuronEdit | None
) -> dict[str, float]:
    """The task's metrics with the patch on: what is judged is what is served."""
    with patch.apply(base.model, root=base.root) if patch else nullcontext():
        said: dict[str, Answers] = {k: ask(base, config, d, by) for k, d in data.items()}
    return metrics(config, said)


def _examples(
    base: Base, config: Config, data: Mapping[str, Dataset], by: LabelSet, patch: NeuronEdit,
    report: dict[str, Any], folder: Path, count: int = 8,
) -> None:  # fmt: skip
    """A few pictures of val with what the base and the patched model call them."""
    shown = data["attacked" if config.task == "typographic" else "clean"]
    batch = shown.read(range(min(count, len(shown))))
    said = {}
    for side, on in (("base", None), ("patched", patch)):
        with on.apply(base.model, root=base.root) if on else nullcontext():
            best = by.logits(clip.embed_images(base, batch.image)).argmax(1)
            said[side] = [shown.classes[i] for i in best.tolist()]
    report["examples"] = {**said, "is": [shown.classes[i] for i in batch.label.tolist()]}
    save_file({"image": batch.image.cpu().contiguous()}, folder / "examples.safetensors")


# ---- pictures ----------------------------------------------------------------------------------------------------


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What one direction explains, ablations, what the lens leaves out, who carries neurons, candidates, neuron cards,
    base beside patched on test."""
    from matplotlib.figure import Figure

    report = json.loads((folder / "report.json").read_text())
    asked, out = report["questions"], {}
    names = sorted(asked["layers"], key=int)

    f = Figure(figsize=(9, 3.4), layout="constrained")
    for a, key, title in zip(
        f.subplots(1, 2), ("explained", "explained_all"),
        ("largest effects, first direction", "all pictures, along the direction"), strict=True,
    ):  # fmt: skip
        for name in names:
            got = asked["layers"][name]
            edges = [(i + 0.5) / BINS for i in range(BINS)]
            label = f"layer {name}, of {got['directions']}: median {got[key]['quartiles'][1]:.2f}"
            a.step(edges, got[key]["histogram"], where="mid", label=label)
        a.set(title=f"Explained variance: {title}", xlabel="share", ylabel="neurons")
        a.legend(fontsize=7)
    out["explained"] = f

    f = Figure(figsize=(7, 3.4), layout="constrained")
    a = f.subplots()
    for i, name in enumerate(names):
        rows = asked["ablations"]["layers"][name]
        a.bar([n + 0.8 * i / len(names) - 0.4 for n in range(4)], [rows[k] for k in REPLACEMENTS],
              width=0.8 / len(names), align="edge", label=f"layer {name}")  # fmt: skip
    a.axhline(asked["ablations"]["base"], color="black", linestyle=":", label="nothing replaced")
    a.set_xticks(range(4), REPLACEMENTS)
    a.set(title=f"Accuracy with a layer's effects replaced, val, n = {asked['ablations']['n']}", ylim=(0, 1.02))
    a.legend(fontsize=7)
    out["ablations"] = f

    f = Figure(figsize=(7, 3.4), layout="constrained")
    a = f.subplots()
    for i, name in enumerate(names):
        for kind, line in (("heavy", "-"), ("random", ":")):
            steps = asked["layers"][name]["paths"][kind]["steps"]
            a.semilogy(MOVES, [steps[m]["error"] for m in MOVES], line, marker="o", color=f"C{i}",
                       label=f"layer {name}, {kind} neurons")  # fmt: skip
    a.axhline(1.0, color="grey", linewidth=0.8)
    a.set(
        title="Squared error of the lens as things move",
        xlabel="moves too (cumulative)",
        ylabel="|phi - true|² / |true|²",
    )
    a.legend(fontsize=7)
    a.grid(alpha=0.25)
    out["linearisation"] = f

    f = Figure(figsize=(2.6 * len(names) + 1, 3), layout="constrained")
    for a, name in zip(f.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        table = asked["layers"][name]["carried_by"]
        shown = a.imshow(table, cmap="viridis", vmin=0)
        a.set_yticks(range(len(table)), [str(int(name) + 1 + i) for i in range(len(table))])
        a.set(title=f"neurons of layer {name}", xlabel="head", ylabel="layer")
        f.colorbar(shown, ax=a, shrink=0.7)
    f.suptitle("Mean share of a neuron's effects that a head carries", fontsize=9)
    out["carriers"] = f

    out["candidates"] = _candidates(report)
    out["neurons"] = _cards(folder, report)

    out["test"] = tasks.bars(results)
    return out


def _candidates(report: Mapping[str, Any]) -> Any:
    """The goal on val by layer, edit and number of neurons, beside base and control."""
    from matplotlib.figure import Figure

    goal, rows = GOAL[report["task"]], report["candidates"]
    f = Figure(figsize=(7, 3.8), layout="constrained")
    a = f.subplots()
    for layer, edit in sorted({(r["layer"], r["edit"]) for r in rows}):
        mine = [r for r in rows if (r["layer"], r["edit"]) == (layer, edit)]
        a.semilogx([r["count"] for r in mine], [r[goal] for r in mine], "o-" if edit == "effects" else "s--",
                   color=f"C{layer}", label=f"layer {layer}, {edit}")  # fmt: skip
        hollow = [r for r in mine if r["worth"] < 0]  # costs more than the bound
        a.plot([r["count"] for r in hollow], [r[goal] for r in hollow], "o", markerfacecolor="white", color=f"C{layer}")
    a.axhline(report["base"][goal], color="grey", linestyle=":", label="base")
    a.plot(report["chosen"]["count"], report["random"][goal], "x", color="black", label="random neurons")
    a.set(title=f"Choosing on val: {goal.replace('_', ' ')} (hollow: costs too much)", xlabel="neurons", ylabel=goal)
    a.legend(fontsize=7)
    a.grid(alpha=0.25)
    return f


def _cards(folder: Path, report: Mapping[str, Any], rows: int = 6, columns: int = 5) -> Any:
    """Neurons of the chosen layer that are described best by texts and matter: their words and strongest pictures."""
    from matplotlib.figure import Figure

    cards, layer = load_neurons(folder), report["chosen"]["layer"]
    one = cards.layers[layer]
    shown = (one.known.spread * one.known.explained_all).topk(min(rows, len(one.told))).indices.tolist()
    f = Figure(figsize=(9, 1.15 * len(shown)), layout="constrained")
    grid = f.subplots(len(shown), columns + 1, squeeze=False, width_ratios=[4] + [1] * columns)
    for n, row in zip(shown, grid, strict=True):
        about = cards.card(layer, n, 1, 4)
        words = ", ".join(f"{w['text']} {w['coefficient']:+.2f}" for w in about["texts"])
        row[0].text(0, 0.5, f"{layer}.{n}  (direction {about['explained_all']:.0%})\n{words}", fontsize=7, va="center",
                    wrap=True)  # fmt: skip
        for a in row:
            a.axis("off")
        for a, seen in zip(row[1:], about["pictures"], strict=False):
            a.imshow(cards.thumbs[seen["picture"]].permute(1, 2, 0).numpy())
            a.set_title(f"{seen['projection']:+.2f}", fontsize=6)
    return f


# ---- on test -----------------------------------------------------------------------------------------------------


def report(folder: Path, out: Path) -> dict[str, Any]:
    """A sealed patch and its control on test, the masks of its neurons beside other ways, and pictures composed to
    mislead. Writes JSON as it goes."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    assert isinstance(patch, NeuronEdit)
    fitted = json.loads((folder / "report.json").read_text())
    c = replace(patch.config, neurons=tuple(fitted["random"]["neurons"]))
    control = NeuronEdit(c, load_file(folder / CONTROL)).to(base.device)
    arms = {"base": None, "second_order": patch, "random neurons": control}
    results: dict[str, Any] = {"digest": about.digest, "recipe": sealed["recipe"], "arms": {}}
    for name, arm in arms.items():
        row = results["arms"].setdefault(name, {})
        for split in ("test", *(["held"] if not config.data else [])):
            sets = pictures(config, split, config.test_images)
            with arm.apply(base.model, root=base.root) if arm else nullcontext():
                by = classifier(base, config, sets["clean"], folder=folder)
                said = {k: ask(base, config, d, by) for k, d in sets.items()}
            row[split] = {k: wilson(v) for k, v in outcomes(config, said).items()}
        out.write_text(json.dumps(results, indent=1))
    reader = Reader.of(base, load_neurons(folder))
    if not config.data:
        results["masks"] = segmentation.lab(base, "test", config.test_images, config.seed, reader)
        out.write_text(json.dumps(results, indent=1))
        results["misleading"] = attack(reader, seed=config.seed)
        out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]))
