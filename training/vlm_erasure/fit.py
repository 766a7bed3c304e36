"""Choosing an erasure: where, along which direction, how strongly, below which confidence; on val pictures alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches import artifact
from patches.evidence import write_evidence
from patches.families.base import Base, load_base
from patches.families.vlm.base import depth
from patches.mechanisms.erase import EraseEdit, make
from patches.subject import Subject
from registry.manifest import Manifest
from training.progress import tqdm
from training.vlm_erasure import measure
from training.vlm_erasure.chair import auroc
from training.vlm_erasure.config import Config
from training.vlm_erasure.data import Scenes, Seen, coco, lab, see

FEWER = {"test:neutral": 1, "test:pair": 10, "held:alone": 6}
"""parts beside the claim's own: by how much they are smaller"""


def scenes(config: Config, part: str, kind: str = "alone") -> Scenes:
    """Pictures of `val`, `test` or a part of FEWER. COCO's two parts are different pictures of one folder."""
    n = config.val_scenes if part == "val" else max(4, config.test_scenes // FEWER.get(part, 1))
    if config.pictures == "lab":
        split, _, which = part.partition(":")
        return lab(split, n, config.seed, which or kind)
    whole = coco(
        config.pictures, config.annotations, config.references, config.val_scenes + config.test_scenes, config.seed
    )
    rows = slice(0, config.val_scenes) if part == "val" else slice(config.val_scenes, None)
    start = rows.start or 0
    return Scenes(
        whole.name, f"{whole.digest}-{part}", whole.objects, whole.there[rows], whole.partner[rows],
        lambda i: whole.picture(start + i),
    )  # fmt: skip


def candidates(config: Config, base: Base, objects: tuple[str, ...]) -> Iterator[tuple[str, EraseEdit]]:
    """name -> erasure, for every setting of the config that this base has depths for."""
    last = depth(base)
    for at in config.depths:
        depths = tuple(range(last)) if at == (-1,) else tuple(d for d in at if d < last)
        if not depths:
            continue
        for text in config.text_depths:
            if (text,) == depths and -1 in config.text_depths:
                continue  # the same setting
            where = depths if text < 0 else (text,) * len(depths)
            for own in config.own:
                for weight in config.weights:
                    word = f"{'same' if text < 0 else text}{' own' if own else ''}"
                    name = f"depths {list(depths)} word {word} weight {weight:g}"
                    yield name, make(
                        base, depths, where, weight=weight, own=own, objects=objects, normed=config.normed,
                        rounds=config.rounds,
                    )  # fmt: skip


def score(found: dict[str, Any], kept: float) -> float:
    """What a setting is worth: inventions gone less those said instead; true mentions lost beyond the bound weigh
    double."""
    lost = max(0.0, kept - float(found["kept"].value))
    return float(found["gone"].value) + float(found["kept"].value) - float(found["invented instead"].value) - 2 * lost


def sweep(
    config: Config, subject: Subject, seen: Seen, said: Tensor, wrong: Tensor
) -> dict[str, tuple[EraseEdit, dict[str, Any]]]:
    """name -> (erasure, its effect on the first `sweep_captions` captions with an invention)."""
    some = wrong.clone()
    some[wrong.any(1).nonzero()[config.sweep_captions :, 0]] = False
    out = {}
    tried = list(candidates(config, subject.base, seen.scenes.objects))
    for name, patch in tqdm(tried, "erasures", disable=None, leave=False):
        after = measure.again(subject, seen, said, some, patch)
        out[name] = (patch, measure.effect(said, after, seen.scenes.there, some))
    return out


def finals(
    config: Config, subject: Subject, seen: Seen, said: Tensor, sure: Tensor, limit: float,
    tried: Mapping[str, tuple[EraseEdit, dict[str, Any]]],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The two best settings of every set of depths, judged by what they are for: CHAIR_i and recall after the automatic
    mode on all val pictures. Those that lose recall against the base are left out, unless all do."""
    ranked: dict[str, list[str]] = {}
    for name in sorted(tried, key=lambda k: score(tried[k][1], config.kept), reverse=True):
        ranked.setdefault(name[: name.index("]") + 1], []).append(name)
    base = measure.chair(said, seen.scenes.there)["recall"].value
    out = {}
    for name in [n for names in ranked.values() for n in names[:2]]:
        new, _ = measure.automatic(subject, seen, said, sure, limit, tried[name][0], config.rounds)
        found = measure.chair(new, seen.scenes.there)
        out[name] = {k: round(found[k].value, 4) for k in ("chair_i", "chair_s", "recall")}
    return {k: v for k, v in out.items() if v["recall"] >= base} or out


def fit(config: Config, folder: Path) -> Manifest:
    """Choose on val pictures, and seal the erasure with the sweep as evidence."""
    base = load_base(config.base, "vlm", config.device)
    subject = Subject(base, {})
    try:
        seen = see(base, scenes(config, "val"), config.question, config.max_tokens)
        said = measure.captions(subject, seen)
        there = seen.scenes.there
        wrong = said.mask & ~there
        tried = sweep(config, subject, seen, said.mask, wrong)
        field = measure.lens_field(subject, seen, config.normed).float().amax(2)  # (N, L + 1, C)
        depths, sure = best_depths(field, said.mask, there)
        limit = measure.threshold(sure[said.mask], there[said.mask]) if bool(said.mask.any()) else 0.1
        judged = finals(config, subject, seen, said.mask, sure, limit, tried)
        best = min(judged, key=lambda k: judged[k]["chair_i"])
    finally:
        subject.close()
    patch = tried[best][0]
    chosen = EraseEdit(_with(patch.config, limit=round(float(limit), 6), lens_depths=depths), patch.tensors)
    about = {
        "chosen": best,
        "automatic": judged,
        "sweep": {k: {m: v.value for m, v in found.items()} for k, (_, found) in tried.items()},
        "limit": chosen.config.limit,
        "lens_depths": list(depths),
        "val": {k: v.value for k, v in measure.chair(said.mask, there, seen.scenes.partner).items()},
    }
    about["examples"] = examples(folder, seen, said, wrong)
    write_evidence(folder, about)
    return artifact.save(chosen, "vlm_erasure", folder, base=base.label)


def examples(folder: Path, seen: Seen, said: measure.Said, wrong: Tensor, n: int = 5) -> list[dict[str, str]]:
    """Seal n val pictures whose captions invent something; what is there, and what the base says."""
    from safetensors.torch import save_file
    from torchvision.transforms.functional import pil_to_tensor

    rows = wrong.any(1).nonzero()[:n, 0].tolist() or [0]
    images = [pil_to_tensor(seen.scenes.picture(i)) for i in rows]
    if len({x.shape for x in images}) > 1:  # photographs of all sizes: only the first
        rows, images = rows[:1], images[:1]
    save_file({"image": torch.stack(images)}, folder / "examples.safetensors")
    names = seen.scenes.names
    return [
        {"is": ", ".join(names[c] for c in seen.scenes.there[i].nonzero()[:, 0].tolist()), "base": said.texts[i]}
        for i in rows
    ]


def best_depths(field: Tensor, said: Tensor, there: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The depths whose lens (or the maximum over all) tells true from invented mentions best on val, and (N, C) the
    confidence there. A single depth must beat the paper's maximum to be taken."""
    right, wrong = said & there, said & ~there
    L = field.shape[1]
    options: dict[tuple[int, ...], Tensor] = {tuple(range(L)): field.amax(1), **{(d,): field[:, d] for d in range(L)}}
    if not bool(wrong.any()) or not bool(right.any()):
        return (0,), field[:, 0]
    best = max(options, key=lambda k: auroc(options[k][right], options[k][wrong]))
    return best, options[best]


def _with(config: Any, **more: Any) -> Any:
    from dataclasses import replace

    return replace(config, **more)


def confidence(subject: Subject, seen: Seen, patch: EraseEdit) -> Tensor:
    """(N, C) the confidence a fitted erasure goes by."""
    field = measure.lens_field(subject, seen, patch.config.normed).float().amax(2)
    return field[:, list(patch.config.lens_depths)].amax(1)


__all__ = ["best_depths", "candidates", "confidence", "fit", "scenes", "sweep"]
