"""What a patch of CLIP is measured by: a typographic attack, two biased sets, steering; real data or its twin.

Shared by the jobs that edit CLIP. Every task has a metric that counts (`GOAL`) and one that must stay (`KEPT`); what is
chosen is chosen on val by `worth`, and test is only ever reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from patches.evidence.label_set import FILE, LabelSet, load_label_set, save_label_set
from patches.families import clip
from patches.families.base import Base
from patches.subject import Subject
from registry.errors import ConfigError
from training.data import images as readers
from training.data.images import Batch, Dataset
from training.data.typographic import written
from training.lab import atlas, worlds

Task = Literal["typographic", "waterbirds", "celeba", "steer"]
Classifier = Literal["zero-shot", "probe"]
PROBE_IMAGES, PROBE_DECAY = 1600, 1e-5
"""of train; of the squared weights. The more decay the more a probe leans on what should not matter (val, waterbirds,
average and worst group: .81 and .48 at 1e-3, .83 and .57 at 1e-4, .87 and .69 here)"""


class Asked(Protocol):
    """What a job's config says of its task."""

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
    """What a model says of n pictures."""

    logits: Tensor
    """(n, C)"""
    label: Tensor
    """(n,)"""
    other: Tensor
    """(n,) what should not matter: the class that is written (-1 for none), or the place; of steer, the word's class"""


def pictures(config: Asked, split: str, n: int, fold: str = "") -> dict[str, Dataset]:
    """The sets a task is measured on, by name: `clean`, and for the typographic one `attacked` and `blank`, the same
    pictures with another class written on them, and with the strip alone. fold: of the lab's groups (worlds.HANDS)."""
    if fold and (config.data or config.task not in ("waterbirds", "celeba")):
        raise ConfigError(f"Folds are of the lab's groups: waterbirds or celeba without `data`, not {config.task}.")
    if config.task == "typographic":
        words = {"clean": "none", "attacked": "wrong", "blank": "blank"}
        return {name: world(config, "typographic", split, n, word=w) for name, w in words.items()}
    if config.task == "steer":
        return {"clean": world(config, "imagenet", split, n)}
    # groups are drawn alike to fit on: at the twins' own correlation a rare group is ten pictures of 384, which gates
    # learn by heart. A real data set is drawn as it is, and its groups are weighted
    even: dict[str, Any] = {"correlation": 0.5} if split == "train" and not config.data else {}
    return {"clean": world(config, config.task, split, n, fold=fold, **even)}


def world(config: Asked, name: str, split: str, n: int, seed: int = 0, **more: Any) -> Dataset:
    """A set of the lab world, or its real twin out of `data`, at most n pictures of it drawn by the seed."""
    if not config.data:
        return worlds.WORLDS[name](split, n, config.seed + seed, device=config.device, **more)
    if name == "typographic":
        whole = written(readers.imagenet(config.data, split), seed=config.seed, **more)
    else:
        whole = readers.READERS[name](config.data, split)
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
    """What tells the task's classes apart: a probe, or zero-shot, where the lab's birds are asked for by the names of
    their kinds. Blond or not is the mean of the names people are drawn as: hair is no kind of person to this model.

    folder: of the sealed patch that is measured; its probe is the one that is served, so that one is taken."""
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
    """Of every kind of the lab's birds its class, and its name."""
    both = worlds.LANDBIRDS, worlds.WATERBIRDS
    return ("landbird",) * len(both[0]) + ("waterbird",) * len(both[1]), (*both[0], *both[1])


_probes: dict[tuple[Any, ...], LabelSet] = {}
"""the last one, so that a fit and its measurements share it"""


def probe(base: Base, config: Asked, fold: str = "") -> LabelSet:
    """A linear classifier of the base's embeddings, by least cross-entropy on the train split as it is: what train
    couples, it takes for the class (empirical risk minimisation). The lab's birds are told by kind, as species are.
    fold: whose train it is fitted on."""
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
    """Put a probe beside the patch that was fitted for it; zero-shot weights are texts and need no file."""
    if config.classifier == "probe":
        save_label_set(by, folder)


def outcomes(config: Asked, said: Mapping[str, Answers]) -> dict[str, Tensor]:
    """metric -> (n,) 0 or 1 per picture that it is the mean of; of steer also probabilities."""
    clean = said["clean"]
    right = clean.logits.argmax(1) == clean.label
    if config.task == "typographic":
        hit = said["attacked"]
        best = hit.logits.argmax(1)
        true, word = (hit.logits.gather(1, t[:, None])[:, 0] for t in (hit.label, hit.other))
        return {
            "clean": right,
            "attacked": best == hit.label,
            "says_word": best == hit.other,
            "two_way": true > word,
            "blank": said["blank"].logits.argmax(1) == said["blank"].label,
        }
    if config.task == "steer":
        p = clean.logits.softmax(1).gather(1, clean.other[:, None])[:, 0]
        return {"probability": p, "says": clean.logits.argmax(1) == clean.other}
    group = 2 * clean.label + clean.other
    return {"average": right, **{f"group_{g}": right[group == g] for g in range(4) if bool((group == g).any())}}


def metrics(config: Asked, said: Mapping[str, Answers]) -> dict[str, float]:
    """The task's numbers: what counts is `attacked`, `worst_group` or `probability`; what must stay, clean, average."""
    got = {k: share(v) for k, v in outcomes(config, said).items()}
    return got | ({"worst_group": min(v for k, v in got.items() if k != "average")} if "average" in got else {})


GOAL = {"typographic": "attacked", "waterbirds": "worst_group", "celeba": "worst_group", "steer": "probability"}
KEPT = {"typographic": "clean", "waterbirds": "average", "celeba": "average", "steer": ""}


def worth(config: Asked, got: Mapping[str, float], base: Mapping[str, float]) -> float:
    """What a candidate is chosen by: its goal if it keeps what must stay, else how near it comes to keeping it."""
    kept = KEPT[config.task]
    short = base[kept] - config.bound - got[kept] if kept else 0.0
    return got[GOAL[config.task]] if short <= 1e-9 else -short


def share(yes: Tensor) -> float:
    return round(float(yes.float().mean()), 6) if len(yes) else 0.0


@torch.no_grad()
def ask(base: Base, config: Asked, data: Dataset, by: LabelSet) -> Answers:
    """What the base, with the patches that are applied to it, answers to every picture."""
    logits, label, other = [], [], []
    for batch in data.batches(50):
        logits.append(by.logits(clip.embed_images(base, batch.image), clip.logit_scale(base)))
        label.append(batch.label)
        other.append(other_of(config, data, batch))
    return Answers(*(torch.cat(part).cpu() for part in (logits, label, other)))


def other_of(config: Asked, data: Dataset, batch: Batch) -> Tensor:
    if config.task == "steer":
        if config.word not in data.classes:
            raise ConfigError(
                f"{config.word!r:.40} is no class of {data.name}. Classes: {', '.join(data.classes[:12])}."
            )
        return torch.full_like(batch.label, data.classes.index(config.word))
    other: Tensor = batch.extras["word_label" if config.task == "typographic" else "place"]
    return other


GROUPS = {"clean": "quality", "blank": "quality", "average": "quality"}
"""metrics that should stay; the others are what the patch is for"""


def evaluate(model: Subject, config: Asked, arm: str | None) -> dict[str, float]:
    """The task's metrics on test, and for the lab's twins in the style no lab model was trained on (`_held`)."""
    out: dict[str, float] = {}
    for split, end in (("test", ""), *([("held", "_held")] if not config.data else [])):
        sets = pictures(config, split, config.test_images)
        by = classifier(model.base, config, sets["clean"], folder=model.folder)
        with model.applied.rows([arm]):  # one name stands for all rows of every batch
            said = {k: ask(model.base, config, d, by) for k, d in sets.items()}
        for key, value in metrics(config, said).items():
            out[f"{GROUPS.get(key, 'target')}/{key}{end}"] = round(value, 6)
    return out


def affordable(counts: Sequence[int], among: int) -> list[int]:
    """Of the counts of things to edit those that leave as many others for a control, or else the most that do."""
    return [n for n in counts if 2 * n <= among] or [among // 2]


def alike(mass: Tensor, chosen: Sequence[int], seed: int) -> list[int]:
    """A control: for each chosen one another, the nearest in mass (N,), ties drawn; none twice. ConfigError if fewer
    others are left than are chosen."""
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
    """The figure every job ends with: metrics on test, arm beside arm."""
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
