"""lab:diffusion: how a trained run becomes the folder that ships, and what its pictures are worth to two judges.

    python -m training.lab.diffusion numbers 100           # draws 100 pictures from prompts and asks both judges
    python -m training.lab.diffusion ship RUN FOLDER       # RUN: config.json and lab-diffusion-*.safetensors of a
    training run

The recipe of the run stands in patches/lab/diffusion/README.md. `ship` rounds the weights to 8 bits, names the
encoder by its digest and the two token embeddings that were zero when it was trained, and stores golden text states
that loading checks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from patches.families import clip
from patches.families.base import load_base
from patches.families.diffusion import Denoising, drawn, lab
from patches.families.diffusion import base as bases
from patches.families.diffusion.packed import FILE, pack
from patches.subject import Subject
from training.lab import atlas, judge
from training.tasks.intervals import wilson

GOLDEN_PROMPTS = ("", "a picture of a dog face", "old woman")
ENDS = ("<start_of_text>", "<end_of_text>")
"""marks whose token embeddings were zero in the encoder of the run"""
SHORT = 11


def ship(run: Path, folder: Path) -> None:
    """Write the weights and configs of a run as a folder that `load("local-dir:...")` reads."""
    about = json.loads((run / "config.json").read_text())
    state: dict[str, torch.Tensor] = {}
    for part in sorted(run.glob("lab-diffusion-*.safetensors")):
        state |= {k: v.float() for k, v in load_file(part).items()}
    projection = {k: v for k, v in about["image_proj"].items() if k != "input_scale"}
    for name, prefix, config in (
        ("unet", "unet.", about["unet"]),
        ("image_proj", "image_proj.", {"_class_name": "ImageProjection", **projection}),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pack({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, folder / name / FILE)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(about["scheduler"], indent=2) + "\n")
    encoder = load_base("lab:clip", "clip")
    inner = encoder.processor.tokenizer.tokenizer
    rows = [inner.convert_tokens_to_ids(mark) for mark in ENDS]
    told = {"ref": "lab:clip", "digest": encoder.digest, "zero_rows": rows}
    (folder / bases.INDEX).write_text(json.dumps({"_class_name": "LabDiffusion", "encoder": told}, indent=2) + "\n")
    (folder / lab.GOLDEN).unlink(missing_ok=True)
    states = {k: v.half() for k, v in lab.golden(lab.read(folder), GOLDEN_PROMPTS).items()}
    save_file(states, folder / lab.GOLDEN, {"prompts": json.dumps(GOLDEN_PROMPTS)})


def prompted(count: int, seed: int = 0) -> list[str]:
    """`count` short names of animals, plants and food, drawn at random."""
    known = atlas.load()
    names = [n for n, g in zip(known.names, known.groups, strict=True) if g in ("animals-nature", "food-drink")]
    names = [n for n in names if len(n) <= SHORT]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return [names[int(i)] for i in order[:count]]


def numbers(count: int, guidance: float = 3.0, steps: int = 10) -> dict[str, list[float]]:
    """judge -> [share, low, high, n] of pictures that it calls what the prompt said, among the names that were asked
    for."""
    names = prompted(count)
    subject = Subject({"base": load_base("lab:diffusion", "diffusion")})
    rows: list[Denoising] = [
        drawn(subject.base.model, f"a picture of a {name}", guidance=guidance, steps=steps, seed=i)
        for i, name in enumerate(names)
    ]
    subject.worker().run(rows)
    x = torch.stack([row.picture for row in rows if row.picture is not None])
    known, at = atlas.load().names, torch.arange(len(names))
    scores = judge.logits(judge.load(), x)
    among = scores[:, [known.index(name) for name in names]].argmax(1)
    e = subject.base.model.embeddings(x)
    weights = clip.zero_shot(load_base("lab:clip", "clip"), names)
    return {
        f"cnn, of {len(names)}": wilson(among == at),
        "cnn, of all names": wilson(scores.argmax(1) == torch.tensor([known.index(name) for name in names])),
        f"clip, of {len(names)}": wilson((e @ weights).argmax(1) == at),
    }


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ship", run, folder]:
            ship(Path(run), Path(folder))
        case ["numbers", count]:
            sys.stdout.write(json.dumps(numbers(int(count)), indent=2) + "\n")
        case _:
            sys.exit(__doc__)
