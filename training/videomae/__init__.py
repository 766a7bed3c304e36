"""videomae: a video encoder pre-trained on synthetic clips, and how much of natural pre-training's gain they give.

Paper: Yu, Wang, Li et al., "Learning Video Representations without Natural Videos", arXiv 2410.24213; VideoMAE: Tong et
al., arXiv 2203.12602. Claim: a VideoMAE pre-trained on a progression of generated videos closes 97 % of the gap between
training from scratch and pre-training on natural videos (UCF101, fine-tuned; 41 % by linear probe); the largest step is
motion. docs/systems/videomae.md has what was measured here, docs/log/videomae.md how.

    patchbay fit videomae/tiny          # seconds
    patchbay fit videomae/lab           # one checkpoint: minutes of one core
    patchbay fit videomae/lab stage=moving_circles steps=16000
    patchbay fit videomae/paper device=cuda data=/folder/of/UCF101
    python -m training.videomae.progression FOLDER      # every stage, 3 seeds, both controls: hours of two cores
    python -m training.videomae.report FOLDER           # its table, share of the gap closed, correlations, figure

What is sealed is a checkpoint (kind `model`): encoder and decoder, the attentive probe of the frozen encoder, and a
fine-tuned copy. `evaluate` measures the base it is compared with by the same metrics, from its own folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from patches.families.base import load_base
from patches.families.video import base as checkpoints
from patches.families.video.model import MaskedVideo
from patches.families.video.pixels import Still
from patches.subject import Subject
from registry import manifest
from registry.config import STRICT
from registry.errors import ConfigError
from registry.manifest import Manifest
from registry.measure import Measure
from training.lab.video import actions, stages
from training.tasks import motion
from training.tasks.intervals import wilson
from training.videomae.tuning import Classifier, features, finetune
from training.videomae.pretraining import Plan, Size, new, pretrain

SCRATCH, NATURAL = "scratch", "natural"


@dataclass(frozen=True)
class Config:
    """What to pre-train on, what to fit on top, and what to measure."""

    __pydantic_config__ = STRICT

    base: str = "lab:video-scratch"
    """the checkpoint it is compared with: of the same frames, size and classes"""
    stage: str = "image_crops"
    """a stage of the progression, `natural` for the task's own clips without their labels, `scratch` for none"""
    data: str = ""
    """folder of UCF101 (labelled clips, and natural pre-training); empty: the lab's actions"""
    device: str = "cpu"
    seed: int = 0
    size: Size = field(default_factory=Size)
    steps: int = 8000
    batch: int = 32
    peak: float = 2e-3
    ratio: float = 0.75
    mask: Literal["tube", "random"] = "random"
    still: Still = "mean"
    """what is taken away from clips that stand still; `keep` for real ones, whose camera moves"""
    pool: int = 8192
    """clips drawn; each batch is one of 96 views of some"""
    bf16: bool = False
    compile: bool = False
    labels: int = 550
    few: int = 110
    tune_steps: int = 300
    tune_peak: float = 2e-3
    layer_decay: float = 1.0
    probe_steps: int = 200
    test_clips: int = 1100


_PAPER = Size(768, 12, 12, 384, 4, 6, image=224, patch=16, frames=16, norm_pix=True)
RECIPES: dict[str, Config] = {
    "tiny": Config(
        base="tiny:motions", size=Size(16, 2, 2, 16, 1, 2, image=16, patch=8, frames=4), steps=12, batch=8, pool=64,
        labels=44, few=22, tune_steps=12, probe_steps=12, test_clips=66,
    ),
    "lab": Config(),
    "demo": Config(steps=400, pool=1024, labels=110, tune_steps=100, test_clips=220),
    "paper": Config(
        size=_PAPER, steps=159_000, batch=192, peak=2.25e-4, mask="tube", still="keep", pool=9537, labels=9537, few=0,
        tune_steps=12_000, tune_peak=1e-3, layer_decay=0.7, bf16=True, compile=True, device="cuda",
    ),
}  # fmt: skip


def fit(config: Config, folder: Path) -> Manifest:
    """Pre-train, probe and fine-tune one checkpoint; sealed as a model."""
    base = load_base(config.base, "video")
    model = made(config, folder / ".checkpoints")
    if (model.frames, model.size, model.classes) != (base.model.frames, base.model.size, base.model.classes):
        raise ConfigError(
            f"{config.base} reads {base.model.frames} frames of {base.model.size} px and tells {len(base.model.classes)} "
            f"classes apart; this recipe has {model.frames}, {model.size} and {len(model.classes)}. Name another base."
        )
    for part in (folder / ".checkpoints").glob("*"):
        part.unlink()
    if (folder / ".checkpoints").is_dir():
        (folder / ".checkpoints").rmdir()
    checkpoints.save(model, folder)
    return manifest.write(folder, kind="model", system="videomae", base=base.label, config=_plain(config))


def made(config: Config, resume: Path | None = None) -> MaskedVideo:
    """The checkpoint of a config: pre-trained (resuming what lies in `resume`), probed and fine-tuned."""
    torch.manual_seed(config.seed)
    size, plan = config.size, plan_of(config)
    if config.stage == SCRATCH:
        net = new(size, config.seed)
    else:
        net, _ = pretrain(unlabelled(config), size, plan, resume, config.device)
    seen = labelled(config, "train", config.labels)
    net = net.cpu()
    x = features(net, seen.video, config.still)[-1]
    probe = motion.probe(x, seen.label, "attention", config.probe_steps, config.seed)
    tuned = finetune(
        None if config.stage == SCRATCH else net.videomae, size, seen, config.still, config.tune_steps, 16,
        config.tune_peak, config.layer_decay, config.seed,
    ).model  # fmt: skip
    assert isinstance(tuned, Classifier)
    return MaskedVideo(net, motion.CLASSES, probe, size.depth, tuned.net, config.still).eval()


def plan_of(config: Config) -> Plan:
    return Plan(config.steps, config.batch, config.peak, ratio=config.ratio, mask=config.mask, still=config.still,
                seed=config.seed, bf16=config.bf16, compile=config.compile)  # fmt: skip


def unlabelled(config: Config) -> Tensor:
    """The clips (n, T, 3, R, R) to pre-train on."""
    s = config.size
    if config.stage == NATURAL and config.data:
        from training.data.video import Sampling, ucf101

        data = ucf101(config.data, "train", 1, Sampling(s.frames, 4, s.image))
        return torch.cat([b.image for b in data.batches(32)])[: config.pool]
    if config.stage == NATURAL:
        return actions.draw("train", config.pool, 30 + config.seed, s.frames, s.image).video
    return stages.draw(config.stage, config.pool, config.seed, s.frames, s.image)


def labelled(config: Config, split: str, n: int) -> actions.Clips:
    """Labelled clips of a split: seed 20 of train is what probes and fine-tuning see, 10 of test what is reported."""
    seed = {"train": 20, "val": 7, "test": 10}[split]
    return motion.clips(split, n, seed, config.size.frames, config.size.image)


@torch.no_grad()
def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """Accuracy of the fine-tuned and of the probed checkpoint, and what its decoder restores, on clips of test."""
    model = subject.alone(arm).model
    assert isinstance(model, MaskedVideo)
    test = labelled(config, "test", config.test_clips)
    out: dict[str, float | Measure] = {}
    parts = [model(clips=part) for part in test.video.split(100)]
    if model.classifier is not None:
        out["accuracy"] = proportion(torch.cat([p["scores"] for p in parts]).argmax(1) == test.label)
    if model.probe is not None:
        probed = torch.cat([model.probe(p["states"][model.probe_layer]) for p in parts]).argmax(1)
        out["probe"] = proportion(probed == test.label)
    if model.decodes:
        some = test.video[:200]
        _, hidden, off = model.reconstruct(some, config.ratio, config.mask)
        away = (some.float() - some.float().mean(1, keepdim=True)) / 255
        nothing = (away.square().mean(2) * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp_min(1)
        out["restored"] = paired(1 - off / nothing.clamp_min(1e-9), float(1 - off.mean() / nothing.mean()))
    return out


def proportion(right: Tensor) -> Measure:
    """A share with its Wilson interval."""
    value, low, high, n = wilson(right)
    return Measure(value, low, high, int(n), "higher")


def paired(each: Tensor, value: float, draws: int = 500) -> Measure:
    """A mean with a bootstrap interval over clips, around `value`, the ratio of means."""
    g = torch.Generator().manual_seed(0)
    kept = each[each.isfinite() & (each > -10)]
    means = kept[torch.randint(len(kept), (draws, len(kept)), generator=g)].mean(1).sort().values
    shift = value - float(kept.mean())
    low, high = float(means[int(0.025 * draws)]) + shift, float(means[int(0.975 * draws) - 1]) + shift
    return Measure(value, low, high, len(kept), "higher")


def figures(folder: Path, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Base beside checkpoint, and a clip, its mask and its reconstruction."""
    from matplotlib.figure import Figure

    names = [n for n in ("accuracy", "probe") if n in results["patched"]]
    bars = Figure((4.5, 3))
    ax = bars.add_subplot()
    for i, (side, values) in enumerate(results.items()):
        ax.bar([x + 0.38 * i for x in range(len(names))], [values.get(n, 0.0) for n in names], 0.36, label=side)
    ax.axhline(1 / len(motion.CLASSES), color="grey", lw=0.8, ls=":")
    ax.set_xticks([x + 0.19 for x in range(len(names))], ["fine-tuned", "frozen probe"][: len(names)])
    ax.set_ylim(0, 1)
    ax.set_ylabel("accuracy on test (dotted: chance)")
    ax.legend(frameon=False)
    model = checkpoints.read(folder)
    assert isinstance(model, MaskedVideo)
    return {"accuracy": bars, "reconstruction": strip(model)}


@torch.no_grad()
def strip(model: MaskedVideo, seed: int = 3) -> Any:
    """Three rows: a clip of test, what the model sees of it, and what it makes of the rest."""
    from matplotlib.figure import Figure

    clips = motion.clips("test", 66, 10, model.frames, model.size).video[seed : seed + 1]
    shown, hidden, _ = model.reconstruct(clips, 0.75, "tube", seed)
    rows = [clips[0].float() / 255, torch.where(hidden[0][:, None], torch.full_like(shown[0], 0.5), shown[0]), shown[0]]
    figure = Figure((model.frames, 3.2))
    for r, frames in enumerate(rows):
        for t in range(model.frames):
            ax = figure.add_subplot(3, model.frames, r * model.frames + t + 1)
            ax.imshow(frames[t].permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    return figure


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Beside the sealed checkpoint: both controls, and the same fine-tuning from scratch, with intervals."""
    test = labelled(config, "test", config.test_clips)
    seen = labelled(config, "train", config.labels)
    table: dict[str, Any] = {}
    for see in (motion.differences, motion.middle):
        right, _ = motion.control(see, seen, test, steps=600 if config.labels > 100 else 20)
        table[f"control {see.__name__}"] = wilson(right)
    scratch = made(replace(config, stage=SCRATCH))
    model = checkpoints.read(folder)
    for name, one in (("scratch", scratch), ("checkpoint", model)):
        with torch.no_grad():
            said = torch.cat([one(clips=part)["scores"] for part in test.video.split(100)]).argmax(1)
        table[f"{name} fine-tuned"] = wilson(said == test.label)
    return table


def _plain(config: Config) -> dict[str, Any]:
    return {k: v for k, v in asdict(config).items() if k != "device"}


__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]
