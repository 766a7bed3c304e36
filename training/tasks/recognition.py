"""Image-recognition tasks by which patches of CLIP are measured: typographic attacks, Waterbirds, CelebA, steering.

Each runs on real data or on its rendered twin. A task has a metric to improve (`GOAL`) and one that must not fall
(`KEPT`). Candidates are compared on val by `worth`; test is only ever reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor

from patches.engine.patch import Patch
from patches.evidence.label_set import FILE, LabelSet, load_label_set, save_label_set
from patches.families import clip
from patches.families.base import Base
from patches.subject import Subject
from registry import gate
from registry.errors import ConfigError
from registry.measure import Measure
from training import choose
from training.data import images as readers
from training.data.images import Batch, Dataset
from training.data.layouts import named, photographs
from training.data.typographic import HANDS, written
from training.evidence import Draft
from training.lab import atlas, worlds
from training.progress import tqdm
from training.tasks.intervals import mean, share

Task = Literal["typographic", "waterbirds", "celeba", "steer"]
Classifier = Literal["zero-shot", "probe"]
PROBE_IMAGES, PROBE_DECAY = 1600, 1e-5
"""Number of train images for fitting a linear probe, and its L2 penalty. A stronger penalty makes the probe rely more
on the spurious cue (val, waterbirds, average and worst-group accuracy: .81 and .48 at 1e-3, .83 and .57 at 1e-4, .87
and .69 here)"""


class Asked(Protocol):
    """The fields that a system's config must have for its patches to be measured on a task."""

    @property
    def task(self) -> Task: ...
    @property
    def classifier(self) -> Classifier: ...
    @property
    def data(self) -> str: ...
    @property
    def word(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def bound(self) -> float: ...
    @property
    def test_images(self) -> int: ...


@dataclass(frozen=True)
class Answers:
    """Logits of n pictures, with their classes and spurious cues."""

    logits: Tensor
    """(n, C) logits over the label set"""
    label: Tensor
    """(n,) index of the true class"""
    other: Tensor
    """(n,) spurious cue: the written class (-1 for none), the place, or for steering the target word's class"""


def pictures(config: Asked, split: str, n: int, fold: str = "", varied: float = 0.0) -> dict[str, Dataset]:
    """Return a task's data sets by name.

    `clean`, and for the typographic task the same images with another class written on them (`attacked`) and with an
    empty strip (`blank`). fold: the illustrator that is held out (worlds.HANDS). varied: share of the writing that is
    of other sizes and colours and mostly without paper, for fitting. Raises ConfigError for a fold of another task.
    """
    if fold and (config.data or config.task not in ("waterbirds", "celeba")):
        raise ConfigError(f"Folds are of the lab's groups: waterbirds or celeba without `data`, not {config.task}.")
    if varied and (config.task != "typographic" or not 0 <= varied <= 1):
        raise ConfigError(f"varied={varied} is a share, 0 to 1, of the writing of task=typographic, not {config.task}.")
    if config.task == "typographic" and split == "test" and (attacks := named(config.data).attacks):
        return {name: _drawn(config, data, n) for name, data in photographs(attacks).items()}
    if config.task == "typographic":
        words = {"clean": "none", "attacked": "wrong", "blank": "blank"}
        other: dict[str, Any] = {"varied": varied} if varied else {}
        return {name: world(config, "typographic", split, n, word=w, **other) for name, w in words.items()}
    if config.task == "steer":
        return {"clean": world(config, "imagenet", split, n)}
    # Groups are balanced for fitting: at the twins' own correlation a rare group has ten images of 384, which gates
    # memorise. A real data set is not resampled; its groups are weighted instead.
    even: dict[str, Any] = {"correlation": 0.5} if split == "train" and not config.data else {}
    return {"clean": world(config, config.task, split, n, fold=fold, **even)}


def world(config: Asked, name: str, split: str, n: int, seed: int = 0, **more: Any) -> Dataset:
    """Draw at most n images, by the seed, from a lab world or from the real data set in `config.data`."""
    where = named(config.data)
    if where.attacks and config.task != "typographic":
        raise ConfigError(f"data={config.data[:80]!r}: attacks are for task=typographic, not {config.task}.")
    if not where.folder:
        return worlds.WORLDS[name](split, n, config.seed + seed, device=config.device, **more)
    if name == "typographic":
        whole = written(readers.imagenet(where.folder, split), seed=config.seed, **more)
    else:
        whole = readers.READERS[name](where.folder, split)
    return _drawn(config, whole, n, seed)


def _drawn(config: Asked, whole: Dataset, n: int, seed: int = 0) -> Dataset:
    """Draw at most n images of a data set by the seed."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(config.seed + seed))[:n]
    about = {**whole.about, "drawn": [config.seed + seed, len(order)]}
    return Dataset(whole.name, whole.split, whole.classes, len(order), about, lambda rows: whole.read(order[rows]))


def classifier(
    base: Base,
    config: Asked,
    data: Dataset,
    templates: Sequence[str] = clip.TEMPLATES,
    folder: Path | None = None,
    fold: str = "",
) -> LabelSet:
    """Build the classifier of a task: a linear probe, or zero-shot weights from the class names' text embeddings.

    The lab's birds are classified by species name, and hair colour by the mean embedding of people's names, since hair
    alone is no concept of this model. folder: that of a sealed patch; if it holds a probe, this one is used, as in
    serving.
    """
    if config.classifier == "probe":
        if folder is None or not (folder / FILE).is_file():
            return probe(base, config, fold)
        one = load_label_set(folder)
        return LabelSet(one.labels, one.weights.to(base.device))
    if config.task == "waterbirds" and not config.data:
        labels, names = _kinds()
        return LabelSet(labels, clip.embed_texts(base, names, templates).T)
    if config.task == "celeba" and not config.data:
        blond: list[str] = []
        others: list[str] = []
        for name in atlas.load().names:
            who = atlas.person(name)
            if who and who.gender and not who.does and who.age in ("", "old"):
                (blond if who.hair == "blond" else others).append(name)
        means = [nnf.normalize(clip.embed_texts(base, k).mean(0), dim=0) for k in (others, blond)]
        return LabelSet(tuple(data.classes), torch.stack(means, 1))
    return LabelSet(tuple(data.classes), clip.zero_shot(base, data.classes, templates))


def _kinds() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class and the species name of each of the lab's birds."""
    both = worlds.LANDBIRDS, worlds.WATERBIRDS
    return ("landbird",) * len(both[0]) + ("waterbird",) * len(both[1]), (*both[0], *both[1])


_probes: dict[tuple[Any, ...], LabelSet] = {}
"""The last fitted probe, shared by a fit and its measurements"""


def probe(base: Base, config: Asked, fold: str = "") -> LabelSet:
    """Fit a linear classifier on the base's embeddings of the train split by empirical risk minimisation.

    So it learns train's spurious correlations. The lab's birds are classified by species. fold: the held-out
    illustrator. Raises ConfigError for a zero-shot task.
    """
    if config.task in ("typographic", "steer"):
        raise ConfigError(f"classifier=probe is for groups, waterbirds or celeba; {config.task} is zero-shot.")
    key = base.digest, config.task, config.data, config.seed, fold
    if key not in _probes:
        data = world(config, config.task, "train", PROBE_IMAGES, fold=fold)
        labels, target = tuple(data.classes), None
        if config.task == "waterbirds" and not config.data:
            labels, names = _kinds()
            target = torch.full((len(atlas.load().names),), -1)
            target[[atlas.load().find(n) for n in names]] = torch.arange(len(names))
        parts = []
        for b in tqdm(data.batches(50), "probe", disable=None, leave=False):
            column = b.label if target is None else target[b.extras["concept"].cpu()]
            parts.append((clip.embed_images(base, b.image).cpu(), column.cpu()))
        y, column = (torch.cat(x) for x in zip(*parts, strict=True))
        w = torch.zeros(y.shape[1], len(labels), requires_grad=True)
        solver = torch.optim.LBFGS([w], max_iter=500, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            off = nnf.cross_entropy(y @ w, column) + PROBE_DECAY * w.square().sum()
            off.backward()  # type: ignore[no-untyped-call]
            return off

        with torch.enable_grad():
            solver.step(loss)  # type: ignore[no-untyped-call]
        _probes.clear()
        _probes[key] = LabelSet(labels, (w.detach() / clip.logit_scale(base)).to(base.device))
    return _probes[key]


def seal_labels(config: Asked, by: LabelSet, folder: Path) -> None:
    """Write a probe beside the patch that was fitted for it; zero-shot weights are recomputed and need no file."""
    if config.classifier == "probe":
        save_label_set(by, folder)


def outcomes(config: Asked, said: Mapping[str, Answers]) -> dict[str, Tensor]:
    """Return the per-image outcomes behind each metric: (n,) of 0 or 1; for steering also probabilities."""
    if config.task == "typographic":
        hit = said["attacked"]
        best = hit.logits.argmax(1)
        true, word = (hit.logits.gather(1, t[:, None])[:, 0] for t in (hit.label, hit.other))
        kept = {k: said[k].logits.argmax(1) == said[k].label for k in ("clean", "blank") if k in said}
        return {
            **kept, "attacked": best == hit.label, "says_word": best == hit.other, "two_way": true > word,
        }  # fmt: skip
    clean = said["clean"]
    right = clean.logits.argmax(1) == clean.label
    if config.task == "steer":
        p = clean.logits.softmax(1).gather(1, clean.other[:, None])[:, 0]
        return {"probability": p, "says": clean.logits.argmax(1) == clean.other}
    group = 2 * clean.label + clean.other
    return {"average": right, **{f"group_{g}": right[group == g] for g in range(4) if bool((group == g).any())}}


LESS = ("says_word",)
"""Metrics that a good patch lowers"""


def measured(config: Asked, said: Mapping[str, Answers]) -> dict[str, Measure]:
    """Compute a task's metrics with 95 % intervals.

    To improve: `attacked`, `worst_group` (with the interval of the group that is worst here) or `probability`; to keep:
    `clean` or `average`.
    """
    got = {
        k: mean(v) if v.is_floating_point() else share(v, "lower" if k in LESS else "higher")
        for k, v in outcomes(config, said).items()
    }
    if "average" in got:
        got["worst_group"] = min((m for k, m in got.items() if k != "average"), key=lambda m: m.value)
    return got


def metrics(config: Asked, said: Mapping[str, Answers]) -> dict[str, float]:
    """Return the point estimates of `measured`, by which candidates are compared."""
    return {k: m.value for k, m in measured(config, said).items()}


GOAL = {"typographic": "attacked", "waterbirds": "worst_group", "celeba": "worst_group", "steer": "probability"}
KEPT = {"typographic": "clean", "waterbirds": "average", "celeba": "average", "steer": ""}


def worth(config: Asked, got: Mapping[str, float], base: Mapping[str, float]) -> float:
    """Return the selection score: the metric to improve, or minus the excess if the one to keep falls by over
    `bound`."""
    kept = KEPT[config.task]
    score = got[GOAL[config.task]]
    return choose.worth(score, got[kept], base[kept] - config.bound) if kept else score


def promises(recipe: str, config: Asked) -> tuple[gate.Promise, ...]:
    """What a patch of a task must do on test: improve its metric for sure, keep the other within two points, and cost
    at most half of the base's time again. A random tower (tiny) promises to break nothing."""
    if recipe == "tiny":
        return gate.loss(f"quality/{KEPT[config.task] or 'clean'}", 0.25), gate.latency(20.0)
    aim, kept = f"target/{GOAL[config.task]}", KEPT[config.task]
    keeps = (gate.loss(f"quality/{kept}", max(0.02, 2 * config.bound)),) if kept else ()
    return gate.gain(aim), *keeps, gate.latency(1.5)


@torch.no_grad()
def ask(base: Base, config: Asked, data: Dataset, by: LabelSet) -> Answers:
    """Classify every image of a data set with whatever patches are applied to the base."""
    logits, label, other = [], [], []
    for batch in data.batches(50):
        logits.append(by.logits(clip.embed_images(base, batch.image), clip.logit_scale(base)))
        label.append(batch.label)
        other.append(other_of(config, data, batch))
    return Answers(*(torch.cat(part).cpu() for part in (logits, label, other)))


def other_of(config: Asked, data: Dataset, batch: Batch) -> Tensor:
    """Return each image's spurious cue (B,), see `Answers.other`.

    Raises ConfigError if the steering word is no class.
    """
    if config.task == "steer":
        if config.word not in data.classes:
            raise ConfigError(
                f"{config.word!r:.40} is no class of {data.name}. Classes: {', '.join(data.classes[:12])}."
            )
        return torch.full_like(batch.label, data.classes.index(config.word))
    other: Tensor = batch.extras["word_label" if config.task == "typographic" else "place"]
    return other


GROUPS = {"clean": "quality", "blank": "quality", "average": "quality"}
"""Prefix of metrics that must not fall; all others are named `target/...`"""


def reported_splits(config: Asked) -> tuple[str, ...]:
    """Return the splits to report: test, and for lab twins also `held`, the style that no lab model was trained on."""
    return ("test",) if config.data else ("test", "held")


def evaluate(model: Subject, config: Asked, arm: str | None) -> dict[str, Measure]:
    """Measure an arm on test, and for lab twins in the held-out style (`_held`): metric -> Measure."""
    out: dict[str, Measure] = {}
    for split in reported_splits(config):
        end = "" if split == "test" else f"_{split}"
        sets = pictures(config, split, config.test_images)
        by = classifier(model.base, config, next(iter(sets.values())), folder=model.folder)
        with model.applied.rows([arm]):  # one name stands for all rows of every batch
            said = {k: ask(model.base, config, d, by) for k, d in sets.items()}
        for key, value in measured(config, said).items():
            out[f"{GROUPS.get(key, 'target')}/{key}{end}"] = value
    return out


@dataclass(frozen=True)
class Arm:
    """A model variant that a report measures: a patch with its strength, and the prompt templates used with it."""

    patch: Patch | None = None
    """Patch to apply; None for the base"""
    strength: float = 1.0
    templates: Sequence[str] = clip.TEMPLATES
    about: Mapping[str, Any] = field(default_factory=dict)
    """How the variant was fitted and chosen, as plain values"""

    def on(self, base: Base) -> AbstractContextManager[Any]:
        """Apply this arm to the base for the duration of a `with` block."""
        return self.patch.apply(base.model, self.strength, base.root) if self.patch else nullcontext()


HAND_IMAGES = 300
"""Number of test images that are written on in each hand of the second renderer"""


def other_hands(config: Asked, n: int = HAND_IMAGES) -> dict[str, dict[str, Dataset]]:
    """Return, per hand of the second renderer, the typographic task's data sets, as `pictures` of the test split does.

    Nothing is fitted or chosen on these hands. Without paper the blank control is the clean image.
    """
    clean = world(config, "typographic", "test", n, word="none")
    words: dict[str, Literal["wrong", "blank"]] = {"attacked": "wrong", "blank": "blank"}
    return {
        name: {k: written(clean, w, config.seed, name) for k, w in words.items()} | {"clean": clean}
        for name in HANDS
        if name != "strip"
    }


def report_arms(
    base: Base, config: Asked, arms: Iterable[tuple[str, Arm]], folder: Path, draft: Draft, by_hand: Sequence[str] = ()
) -> None:
    """Measure every arm on test and in the held-out style.

    Each metric goes with its interval into `draft` under "arms" as soon as it is known.

    folder: that of the sealed patch, whose probe is the classifier if it has one. by_hand: arms that are measured on
    other hands' writing too (typographic task).
    """
    sets = {split: pictures(config, split, config.test_images) for split in reported_splits(config)}
    for name, arm in tqdm(arms, "arms", disable=None):
        if arm.about:
            draft.keep("arms", name, "about", value=dict(arm.about))
        for split, mine in sets.items():
            with arm.on(base):
                by = classifier(base, config, next(iter(mine.values())), arm.templates, folder)
                said = {k: ask(base, config, d, by) for k, d in mine.items()}
            draft.keep("arms", name, split, value=measured(config, said))
        if config.task == "typographic" and name in by_hand:
            for hand, mine in other_hands(config, min(HAND_IMAGES, config.test_images)).items():
                with arm.on(base):
                    by = classifier(base, config, mine["clean"], arm.templates, folder)
                    said = {k: ask(base, config, d, by) for k, d in mine.items()}
                draft.keep("arms", name, f"hand {hand}", value=measured(config, said))


def examples(
    base: Base, config: Asked, data: Mapping[str, Dataset], by: LabelSet, patch: Patch, folder: Path, count: int = 8
) -> dict[str, list[str]]:
    """Record the true class and both predictions (base, patched) of a split's first images.

    The images are saved in examples.safetensors.
    """
    shown = data["attacked" if config.task == "typographic" else "clean"]
    batch = shown.read(range(min(count, len(shown))))
    out = {"is": [shown.classes[i] for i in batch.label.tolist()]}
    for side, arm in (("base", Arm()), ("patched", Arm(patch))):
        with arm.on(base):
            best = by.logits(clip.embed_images(base, batch.image)).argmax(1)
        out[side] = [shown.classes[i] for i in best.tolist()]
    save_file({"image": batch.image.cpu().contiguous()}, folder / "examples.safetensors")
    return out


def affordable(counts: Sequence[int], among: int) -> list[int]:
    """Return the counts that leave as many other items for a control; if none does, the largest that would."""
    return [n for n in counts if 2 * n <= among] or [among // 2]


def matched_control(mass: Tensor, chosen: Sequence[int], seed: int) -> list[int]:
    """Draw a matched control: for each chosen item the nearest other one by mass (N,), ties at random, none twice.

    Raises ConfigError if fewer others are left than were chosen.
    """
    if 2 * len(chosen) > len(mass):
        raise ConfigError(
            f"{len(chosen)} of {len(mass)} are chosen: no control of as many others is left. Choose fewer."
        )
    noise = torch.rand(len(mass), generator=torch.Generator().manual_seed(seed))
    free = mass * (1 + 0.1 * noise)
    free[list(chosen)] = float("inf")
    out: dict[int, int] = {}
    for j in sorted(chosen, key=lambda j: -float(mass[j])):
        out[j] = int((free - mass[j]).abs().argmin())
        free[out[j]] = float("inf")
    return [out[j] for j in chosen]


def bars(results: Mapping[str, Mapping[str, float]]) -> Any:
    """Draw the figure of test metrics as bars, grouped by metric with one bar per arm."""
    from matplotlib.figure import Figure

    keys = [k for k in results["base"] if not k.endswith("_held")]
    f = Figure(figsize=(7, 3.6), layout="constrained")
    a = f.subplots()
    for i, (arm, values) in enumerate(results.items()):
        a.bar([n + 0.4 * i - 0.2 for n in range(len(keys))], [values[k] for k in keys], width=0.4, label=arm)
    a.set_xticks(range(len(keys)), [k.split("/")[1].replace("_", " ") for k in keys], rotation=30, fontsize=8)
    a.set(title="Test", ylim=(0, 1.02))
    a.legend()
    return f
