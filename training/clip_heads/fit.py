"""Fit clip_heads: name the heads, choose on val which to ablate, seal the edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from patches import artifact
from patches.evidence import write_evidence
from patches.evidence.gallery import directions, make_gallery, save_gallery
from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from patches.mechanisms.heads import HeadEdit
from registry.errors import ConfigError
from registry.manifest import Manifest, canonical
from training.choose import Offer, best
from training.clip_heads.config import Config
from training.clip_heads.find import Findings, about, find, scenes
from training.clip_heads.measure import measure
from training.clip_heads.silence import means, random_heads, silence
from training.progress import tqdm
from training.tasks.recognition import (
    KEPT,
    affordable,
    classifier,
    pictures,
    seal_labels,
    worth,
)


def fit(config: Config, folder: Path) -> Manifest:
    """Read and name the heads, choose on val which to ablate, seal the edit with names, evidence and a gallery."""
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
    offers: list[Offer[HeadEdit]] = []
    counts = affordable(config.counts, len(every))
    tried = [(p, n, m) for p in config.ablate for n in counts for m in config.modes]
    for name, count, mode in tqdm(tried, "edits", disable=None, leave=False):
        heads = f.heads(name)[:count]
        edit = silence(lens, heads, mode, config.tokens, mean)
        got = measure(base, config, val, by, edit)
        named = sum(x.label == name for x in f.named if (x.layer, x.head) in heads)
        about_it = {"property": name, "count": count, "mode": mode, "heads": heads, "named": named}
        row = {**about_it, **got, "worth": worth(config, got, plain)}
        offers.append(Offer(edit, row, got[KEPT[config.task]], count))
    if not offers:
        raise ConfigError(f"ablate={config.ablate} and modes={config.modes} leave nothing to try; name some of each.")
    taken = best(offers)
    patch, chosen = taken.what, taken.row
    controls = []
    for draw in range(config.draws):
        other = random_heads(chosen["heads"], every, config.seed + draw)
        got = measure(base, config, val, by, silence(lens, other, chosen["mode"], config.tokens, mean))
        controls.append({"heads": other, **got})
    rows = [o.row for o in offers]
    found = {"task": config.task, "base": plain, "candidates": rows, "chosen": chosen, "random": controls}
    (folder / "heads.json").write_bytes(canonical(json.loads(json.dumps(about(f, base, config)))))
    save_file({"mean": mean.cpu().contiguous()}, folder / "means.safetensors")
    seal_labels(config, by, folder)
    found |= _examples(lens, config, f, folder)
    write_evidence(folder, found)
    if config.gallery_images:
        covariance = torch.stack(
            [torch.stack([f.seen.covariance(n, h) for h in range(lens.heads)]) for n in range(len(f.seen.layers))]
        )
        basis = directions(covariance)
        save_gallery(make_gallery(lens, _shown(base, config), f.seen.layers, basis, config.share), folder / "gallery")
    return artifact.save(patch, "clip_heads", folder, base=base.label)


def _examples(lens: Lens, config: Config, f: Findings, folder: Path, count: int = 6) -> dict[str, Any]:
    """Save val images with heat maps for a figure; return the row that the evidence keeps.

    Maps are of the best head of each property against its first text, and of all heads against the predicted class.
    """
    base = lens.base
    data = next(iter(scenes(config, 4 * count, "val")))
    batch = data.read(range(min(count, len(data))))
    x = base.processor.image(batch.image)
    out: dict[str, Any] = {}
    rows: list[str] = []
    grids: list[Tensor] = []
    for name in f.properties:
        head = f.heads(name)[0]
        found = next(s for s in f.spans if (s.layer, s.head) == head)
        own = [i for i in found.texts if f.fits[i, f.properties.index(name)]] or list(found.texts)
        if own:
            rows.append(f"{name}, head {head[0]}.{head[1]}: {f.pool[own[0]]}")
            grids.append(maps.grid(lens, x, f.features[own[:1]], [head])[:, 0])
    weights = clip.zero_shot(base, data.classes) if len(set(data.classes)) == len(data.classes) else None
    if weights is not None:
        predicted = (clip.embed_images(base, x) @ weights).argmax(1)
        every = maps.grid(lens, x, (weights - weights.mean(1, keepdim=True)).T)
        rows.append("all heads, the predicted class")
        grids.append(every[torch.arange(len(x)), predicted])
        out["predicted"] = [data.classes[i] for i in predicted.tolist()]
    save_file(
        {"image": batch.image.cpu().contiguous(), "maps": torch.stack(grids).cpu().contiguous()},
        folder / "examples.safetensors",
    )
    return {**out, "rows": rows}


def _shown(base: Base, config: Config) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Yield val images for the gallery."""
    number = 0
    for data in scenes(config, config.gallery_images, "val"):
        for part in data.batches(32):
            names = [f"{data.name}/{data.split} {number + i}" for i in range(len(part))]
            number += len(part)
            yield base.processor.image(part.image), part.image, names
