"""Makes a checkpoint that ships out of a sweep's weights: probed, fine-tuned, half precision on disk, with a card.

python -m training.videomae.ship SWEEP ROW FOLDER [seed=0]       # ROW scratch, natural or a stage
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from patches.families.video import base as checkpoints
from patches.families.video.model import MaskedVideo
from registry import config as configs
from training.tasks import motion
from training.tasks.intervals import wilson
from training.videomae import tuning
from training.videomae.pretraining import new
from training.videomae.progression import SCRATCH, Sweep, labelled, test


def ship(sweep: Path, row: str, folder: Path, seed: int = 0) -> MaskedVideo:
    """Probe and fine-tune a row's encoder as the sweep did, and write the checkpoint with its card."""
    how = configs.parse(Sweep, json.loads((sweep / "sweep.json").read_text()))
    net = new(how.size, seed)
    if row != SCRATCH:
        net.load_state_dict(load_file(sweep / f"{row}.{seed}.safetensors"))
    seen, still = labelled(how, seed), how.plan().still
    x = tuning.features(net, seen.video, still)[-1]
    probe = motion.probe(x, seen.label, "attention", how.probe_steps, seed)
    encoder = None if row == SCRATCH else net.videomae
    tuned = tuning.finetune(encoder, how.size, seen, still, how.more_steps, 16, how.peak, how.decay, seed).model
    model = MaskedVideo(net, motion.CLASSES, probe, how.size.depth, tuned.net, still).eval()
    checkpoints.save(model, folder, torch.float16)
    again = checkpoints.read(folder).eval()
    assert isinstance(again, MaskedVideo)
    (folder / "README.md").write_text(card(again, how, row, seed))
    return model


@torch.no_grad()
def card(model: MaskedVideo, how: Sweep, row: str, seed: int) -> str:
    """What the checkpoint is and what it reaches, measured as it lies on disk."""
    held = test(how)
    scores, probed = [], []
    for part in held.video.split(100):
        out = model(clips=part)
        scores.append(out["scores"].argmax(1))
        assert model.probe is not None
        probed.append(model.probe(out["states"][model.probe_layer]).argmax(1))
    lines = []
    for name, said in (("fine-tuned copy", scores), ("attentive probe of the frozen encoder", probed)):
        value, low, high, n = wilson(torch.cat(said) == held.label)
        lines.append(f"| {name} | {value:.3f} [{low:.3f}, {high:.3f}] | {int(n)} |")
    trained = (
        "None: the encoder is random; probe and fine-tuned copy saw the labelled clips alone."
        if row == SCRATCH
        else f"{how.steps} steps of {how.batch} clips out of {how.pool} ({row}), each one of 96 views; {how.mask} mask "
        f"of {how.ratio}; the clip's {how.still} frame taken away."
    )
    size = how.size
    return "\n".join([
        f"# lab:video-{row.replace('_', '-')}", "",
        f"A VideoMAE of the lab ({size.frames} frames of {size.image} px, patch {size.patch}, width {size.width}, "
        f"depth {size.depth}), transformers' layout, half precision on disk.", "",
        f"Pre-training: {trained}", f"Seed {seed}; {how.more} labelled clips of train.", "",
        "| eleven motions, test split of the lab (icons and grounds unseen) | accuracy, 95 % | n |", "|---|---|---|",
        *lines, "", "Chance is 0.091. Numbers are lab numbers. Made by `python -m training.videomae.ship`.", "",
    ])  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    _seed = int(next((w.partition("=")[2] for w in sys.argv[4:] if w.startswith("seed=")), 0))
    ship(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), _seed)
