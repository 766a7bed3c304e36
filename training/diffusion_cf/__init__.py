"""diffusion_cf: counterfactual pictures by moving a diffusion model's conditioning from one class to another.

Paper: "DIFFusion", arXiv 2504.08046. Claim: with a few unpaired pictures of two classes that differ subtly, adding
the difference of their mean image embeddings to a picture's own embedding, while its inverted noise is kept, turns
it into the other class with little else changed; no text, no classifier in the loop. The paper's tables could not be
read, so its numbers are not quoted.

    patchbay fit diffusion_cf/tiny      # a random model: seconds on a CPU
    patchbay fit diffusion_cf/lab       # lab:diffusion, six domains of drawings
    patchbay fit diffusion_cf/paper data=/folder/with/train,val,test base=local-dir:/kandinsky-2-2-decoder device=cuda
    patchbay eval REF --full            # controls, baselines, inversions, few examples, the smallest change that flips

Class means come from train. The amount is chosen on val by the model's own encoder: the smallest one at which enough
pictures, embedded again, lie nearer to the target's mean than to the source's. The judges of `evaluate` are asked by
nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patches import artifact
from patches.engine.patch import apply
from patches.families.base import Base, load_base
from patches.families.diffusion import METHODS, Denoising, Edit, levels
from patches.mechanisms.direction import DirectionConfig, DirectionEdit
from patches.subject import Subject
from registry.config import STRICT
from registry.errors import ConfigError
from registry.manifest import Manifest, canonical
from registry.measure import Better, Measure
from training.diffusion_cf import domains, measure
from training.diffusion_cf.domains import Pictures
from training.diffusion_cf.edit import Editor, How
from training.diffusion_cf.figures import figures
from training.diffusion_cf.find import Bank, bank

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]


@dataclass(frozen=True)
class Tune:
    """LoRA on the denoiser, so that it knows a domain better; off with 0 steps."""

    __pydantic_config__ = STRICT

    steps: int = 0
    rank: int = 4
    alpha: float = 8.0
    rate: float = 4e-4
    batch: int = 8
    dropped: float = 0.1
    """share of rows told nothing, so that the null condition does not drift (the authors' code drops none)"""


@dataclass(frozen=True)
class Config:
    """Which model and domains, how pictures are inverted, and what is measured on how many."""

    __pydantic_config__ = STRICT

    base: str = "lab:diffusion"
    """reference of a diffusion model that is told an image embedding"""
    device: str = "cpu"
    seed: int = 0
    data: str = ""
    """folder of the user's own domain, one folder of pictures a class, split or not; empty: the lab's domains"""
    domains: tuple[str, ...] = tuple(domains.LAB)
    """of the lab"""
    examples: int = 60
    """train pictures a class behind its mean"""
    method: Literal["fixed_point", "ddim", "edit_friendly", "edict", "o_belm"] = "fixed_point"
    levels: int = 8
    """a picture is inverted along, up to nine tenths of the schedule"""
    iterations: int = 3
    """of fixed_point, a level"""
    guidance: float = 2.0
    against: Literal["source", "null"] = "source"
    """what guidance starts from: the picture's own condition, or none, as published"""
    norm: Literal["unit", "free"] = "unit"
    """whether the moved condition gets its old length back; the authors' does not, and their model's is not of unit
    length"""
    amounts: tuple[float, ...] = (0.75, 1.0, 1.5)
    """in class gaps; tried on val"""
    goal: float = 0.9
    """share of val pictures that the model's own encoder must find nearer to the target; the smallest amount that
    reaches it is taken"""
    val_images: int = 1
    """a class"""
    test_images: int = 3
    """a class, for `evaluate`"""
    report_images: int = 20
    """a class, for the main comparison of `eval --full`"""
    report_few: int = 2
    """a class, for baselines and other inversions"""
    judges: tuple[Literal["cnn", "clip"], ...] = ("cnn", "clip")
    tune: Tune = field(default_factory=Tune)

    def __post_init__(self) -> None:
        if not self.amounts or self.method not in METHODS or not self.judges:
            raise ConfigError("amounts and judges must name at least one each.")


RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny", domains=("cats", "citrus"), examples=4, levels=3, iterations=2, amounts=(1.0,), goal=0.0,
        test_images=1, report_images=1, report_few=1, judges=("cnn",),
    ),
    "lab": Config(),
    "paper": Config(
        base="hf-hub:kandinsky-community/kandinsky-2-2-decoder", device="cuda", examples=0, method="edit_friendly",
        levels=100, guidance=4.0, against="null", norm="free", amounts=(1.0, 1.5, 2.0), val_images=20, test_images=100,
        report_images=100, report_few=40, tune=Tune(steps=2000, batch=32),
    ),
}  # fmt: skip


# ---- pictures and rows -------------------------------------------------------------------------------------------


def pictures(config: Config, base: Base, split: str, per_class: int) -> Pictures:
    """Pictures of a split at the base's own size."""
    if config.data:
        return domains.folder(Path(config.data), split, base.model.size, per_class)
    got = domains.lab(split, per_class, config.seed, config.domains)
    return Pictures(measure.sized(got.x, base.model.size[0]), got.label, got.sprite, got.classes, got.domains)


def how(config: Config, base: Base) -> How:
    """How this config inverts and regenerates on a base."""
    return How(
        config.method,
        levels(base.model, config.levels),
        config.iterations,
        config.guidance,
        config.against,
        0,
        config.norm,
    )


def learned(config: Config, editor: Editor, base: Base) -> tuple[Pictures, Bank]:
    """Train pictures and their unit conditions."""
    train = pictures(config, base, "train", config.examples)
    return train, bank(editor.vectors(editor.conditions(train.x)), train)


# ---- fit ---------------------------------------------------------------------------------------------------------


def fit(config: Config, folder: Path) -> Manifest:
    """Class means from train, the amount chosen on val by the model's own encoder, sealed as a DirectionEdit."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "diffusion", config.device)
    tuned: dict[str, Tensor] = {}
    if config.tune.steps:
        from training.diffusion_cf.tuning import tune

        adapter = tune(config.tune, base, pictures(config, base, "train", config.examples), folder, config.seed)
        for name, (a, b) in adapter.factors.items():
            tuned |= {f"a.denoiser.{name}": a.contiguous(), f"b.denoiser.{name}": b.contiguous()}
    with apply(base.model, {}, root=base.root) as on:
        editor = Editor(_Bare(base, on))
        train, known = learned(config, editor, base)
        means = known.means()
        tried = choose(config, editor, base, known)
    enough = [row for row in tried if row["nearer"] >= config.goal]
    best = enough[0] if enough else max(tried, key=lambda row: row["nearer"])
    unit = F.normalize(means, dim=-1)
    pairs = sorted(
        {tuple(sorted((a, int(b)))) for a, b in zip(train.label.tolist(), train.partner().tolist(), strict=True)}
    )
    evidence = {
        "tried": tried, "chosen": best, "classes": list(known.classes), "domains": list(known.domains),
        "examples": [int((known.label == c).sum()) for c in range(len(known.classes))],
        "gaps": [
            {"classes": [known.classes[a], known.classes[b]], "norm": round(float((means[b] - means[a]).norm()), 4),
             "cosine": round(float(unit[a] @ unit[b]), 4)}
            for a, b in pairs
        ],
    }  # fmt: skip
    (folder / "evidence.json").write_bytes(canonical(json.loads(json.dumps(evidence))))
    edit = DirectionEdit(
        DirectionConfig("given.image", known.classes, known.domains, amount=float(best["amount"]), norm=config.norm),
        {"means": means.contiguous(), **tuned},
    )
    return artifact.save(edit, "diffusion_cf", folder, base=base.label)


def choose(config: Config, editor: Editor, base: Base, known: Bank) -> list[dict[str, Any]]:
    """What each amount does to val pictures, by the model's own encoder and by how much it changes. Ascending
    amounts."""
    val, means = pictures(config, base, "val", config.val_images), known.means()
    conditions = editor.conditions(val.x)
    target, h = val.partner(), how(config, base)
    states = editor.invert(val.x, conditions, h, config.seed)
    d = known.directions(val.label, target)
    rows = []
    for amount in tqdm(sorted(config.amounts), "amounts", disable=None, leave=False):
        made = editor.along(states, conditions, d, amount, h)
        e = F.normalize(editor.vectors(editor.conditions(made)), dim=-1)
        unit = F.normalize(means, dim=-1)
        nearer = ((e * unit[target]).sum(1) > (e * unit[val.label]).sum(1)).float().mean()
        rows.append(
            {
                "amount": amount,
                "nearer": round(float(nearer), 4),
                "l1": round(float((made - val.x).abs().mean()), 4),
                "n": len(val),
            }
        )
    return rows


@dataclass(frozen=True)
class _Bare:
    """A base without arms, as a worker wants it."""

    base: Base
    applied: Any


# ---- measuring ---------------------------------------------------------------------------------------------------

BETTER: dict[str, Better] = {"flip": "higher", "top1": "higher"}


def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """Test pictures through the arm, each to the other class of its domain: flips and what else changed. The base
    gives pictures back as it inverts them, so its flips are the judges' own mistakes and its change is that of the
    inversion."""
    test = pictures(config, subject.base, "test", config.test_images)
    made = through(subject, config, test, arm)
    judges = measure.lab_judges(test.classes, config.judges) if not config.data else measure.own_judges(config, test)
    got = measure.judged(judges, test, test.partner(), made).summary()
    out: dict[str, float | Measure] = {}
    for name, (value, low, high, n) in got.items():
        kind = "target" if name.startswith(("flip", "top1")) else "offtarget"
        out[f"{kind}/{name}"] = Measure(value, low, high, int(n), BETTER.get(name.split("_")[0], "lower"))
    return out


def through(subject: Subject, config: Config, source: Pictures, arm: str | None, amount: float | None = None) -> Tensor:
    """(n, 3, H, W) what an arm makes of pictures, each row told its own two classes."""
    editor, h = Editor(subject), how(config, subject.base)
    conditions = editor.conditions(source.x)
    start, target = editor.pipe.latents(source.x), source.partner()
    patch = subject.arms.get(arm) if arm is not None else None
    size = amount if amount is not None else patch.config.amount if isinstance(patch, DirectionEdit) else 0.0
    rows = [
        Denoising(
            condition=c, other=c if h.against == "source" else None, guidance=h.guidance, start=x, seed=config.seed + i,
            program=Edit(h.method, h.levels, h.iterations), arm=arm,
            params={"class": torch.tensor([1.0, float(a), float(b), size])},
        )
        for i, (c, x, a, b) in enumerate(zip(conditions, start, source.label.tolist(), target.tolist(), strict=True))
    ]  # fmt: skip
    return torch.stack([r.picture for r in editor.run(rows, "counterfactuals") if r.picture is not None])


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Everything `eval REF --full` measures; see training.diffusion_cf.report."""
    from training.diffusion_cf.report import full

    return full(folder, config)
