"""Everything around the claim: detectors by depth, erasure by depth with controls, rivals, localisation, other styles.

Settings are those of the sealed artifact and, per depth, the best of its sweep on val; all numbers here are of pictures
nothing was chosen on, with bootstrap intervals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.mechanisms.erase import EraseEdit
from patches.subject import Subject
from registry.measure import Measure
from training.evidence import open_patch
from training.vlm_erasure import measure
from training.vlm_erasure.chair import POPE, chair
from training.vlm_erasure.config import Config
from training.vlm_erasure.data import Seen, see, shares
from training.vlm_erasure.evaluate import questions
from training.vlm_erasure.figures import sweep
from training.vlm_erasure.fit import FEWER, candidates, confidence, scenes, score

MASS = 8
"""absent things that one request erases beside the invented ones, to see what many erasures at once cost"""


def report(folder: Path, config: Config) -> dict[str, Any]:
    """{name: {row: {column: number or Measure}}, or a Figure} of a sealed artifact."""
    opened = open_patch(folder, config.base, config.device)
    assert isinstance(opened.patch, EraseEdit)
    subject = Subject(opened.base, {})
    try:
        tables, figures = _all(subject, opened.patch, dict(opened.fitted), config)
    finally:
        subject.close()
    return {**tables, **figures}


def _all(
    subject: Subject, patch: EraseEdit, found: dict[str, Any], config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    tables: dict[str, Any] = {}
    val = see(subject.base, scenes(config, "val"), config.question, config.max_tokens)
    seen = see(subject.base, scenes(config, "test"), config.question, config.max_tokens)
    said = measure.captions(subject, seen)
    field = measure.lens_field(subject, seen, True)
    tables["detection"] = detectors(subject, val, seen, said, field, config)
    tables["presence"] = {"lens": measure.presence(field, seen.scenes.there)}
    sure = confidence(subject, seen, patch)
    tables["captions"] = mitigation(subject, seen, said.mask, sure, patch, config)
    tables["erasing"] = controls(subject, seen, said.mask, patch)
    tables["by depth"] = by_depth(subject, seen, said.mask, found, config)
    tables["POPE"] = {
        f"{kind}, {side}": questions(subject, seen, kind, config, p, sure if p else None)
        for kind in POPE
        for side, p in (("base", None), ("patched", patch))
    }
    if config.pictures == "lab":
        tables["where"] = where(subject, seen, said, field, config)
        for part in FEWER:
            tables[" ".join(reversed(part.split(":")))] = elsewhere(subject, part, patch, config)
    out = {"sweep": sweep(found), "auroc": _curve(tables["detection"])}
    if config.pictures == "lab":
        out["examples"] = examples(subject, seen, said, sure, patch)
    return tables, out


def detectors(
    subject: Subject, val: Seen, seen: Seen, said: measure.Said, field: Tensor, config: Config
) -> dict[str, Any]:
    """True against invented mentions: the lens by depth, the word's own probability, and a linear probe on the state
    that says it (learned on val)."""
    plain = measure.lens_field(subject, seen, False)
    before = measure.captions(subject, val)
    learned = measure.last_states(subject, val, before)
    held = measure.last_states(subject, seen, said)
    more = {"linear probe on the state that says it": measure.probe(learned, val.scenes.there, held, said.mask.shape)}
    return measure.detection(measure.mentions(said, seen, field, plain, more))


def mitigation(
    subject: Subject, seen: Seen, said: Tensor, sure: Tensor, patch: EraseEdit, config: Config
) -> dict[str, dict[str, Measure]]:
    """Captions before and after: the truth's list, the automatic mode, one round of it, and the rival that just deletes
    the words the lens flags."""
    there, partner, limit = seen.scenes.there, seen.scenes.partner, patch.config.limit
    wrong, low = said & ~there, said & (sure < limit)
    auto, _ = measure.automatic(subject, seen, said, sure, limit, patch, config.rounds)
    once, _ = measure.automatic(subject, seen, said, sure, limit, patch, 1)
    both = {
        "base": said,
        "given list": measure.again(subject, seen, said, wrong, patch),
        "automatic": auto,
        "automatic, one round": once,
        "rival: flagged words deleted": said & ~low,
        "automatic, then flagged words deleted": auto & ~(auto & (sure < limit)),
    }
    return {name: chair(mask, there, partner) for name, mask in both.items()}


def controls(subject: Subject, seen: Seen, said: Tensor, patch: EraseEdit) -> dict[str, dict[str, Measure]]:
    """What erasing does to what it asks for and to what it does not, beside three controls."""
    there = seen.scenes.there
    wrong, right = said & ~there, said & there
    partner = torch.zeros_like(wrong)
    rows = (seen.scenes.partner >= 0).nonzero()[:, 0]
    partner[rows, seen.scenes.partner[rows]] = True
    g = torch.Generator().manual_seed(0)
    absent, one, mass = torch.zeros_like(wrong), torch.zeros_like(right), wrong.clone()
    for i in wrong.any(1).nonzero()[:, 0].tolist():
        free = (~there[i] & ~said[i]).nonzero()[:, 0]
        free = free[torch.randperm(len(free), generator=g)]
        absent[i, free[0]] = True
        mass[i, free[:MASS]] = True
    some = right.any(1).nonzero()[:, 0]
    one[some, right[some].float().argmax(1)] = True
    again = lambda which, instead="": measure.again(subject, seen, said, which, patch, instead)  # noqa: E731
    effect = measure.effect
    return {
        "invented things, given": effect(said, again(wrong), there, wrong),
        "invented partners alone": effect(said, again(wrong & partner), there, wrong & partner),
        "other inventions alone": effect(said, again(wrong & ~partner), there, wrong & ~partner),
        "control: as much along a random direction": effect(said, again(wrong, "random"), there, wrong),
        "control: a random absent thing": effect(said, again(absent), there, wrong, absent),
        "control: a true thing (should go)": effect(said, again(one), there, one),
        f"mass editing: the invented and {MASS} absent things": effect(said, again(mass), there, wrong, mass),
        "mass editing: all true things (should go)": effect(said, again(right), there, right),
    }


def by_depth(subject: Subject, seen: Seen, said: Tensor, found: dict[str, Any], config: Config) -> dict[str, Any]:
    """Per set of depths two settings of the sweep on val, measured here: the best by `score`, and the one that takes
    most away while it keeps what should be kept."""
    best: dict[str, tuple[float, str]] = {}
    most: dict[str, tuple[float, str]] = {}
    for name, values in found["sweep"].items():
        depths = name[: name.index("]") + 1]
        worth = score({k: Measure(v) for k, v in values.items()}, config.kept)
        best[depths] = max(best.get(depths, (-9.0, "")), (worth, name))
        if values["kept"] >= config.kept:
            most[depths] = max(most.get(depths, (-9.0, "")), (values["gone"], name))
    wanted = {name for _, name in (*best.values(), *most.values())}
    wrong = said & ~seen.scenes.there
    made = {k: p for k, p in candidates(config, subject.base, seen.scenes.objects) if k in wanted}
    rows: dict[str, Any] = {}
    for name, patch in made.items():
        rows[name] = measure.effect(said, measure.again(subject, seen, said, wrong, patch), seen.scenes.there, wrong)
        other = measure.again(subject, seen, said, wrong, patch, "random")
        rows[f"{name}, random direction"] = measure.effect(said, other, seen.scenes.there, wrong)
    return rows


def where(subject: Subject, seen: Seen, said: measure.Said, field: Tensor, config: Config) -> dict[str, Any]:
    """Localisation on the token grid: the lens by depth, raw attention (its best layer), chance."""
    side = int(field.shape[2] ** 0.5)
    share = shares(seen.scenes, "test", "alone", config.seed, side)
    things = seen.scenes.things
    assert things is not None
    rows = {f"lens depth {d}": measure.localisation(field[:, d], things, share) for d in range(field.shape[1])}
    rows["lens, max over depths"] = measure.localisation(field.float().amax(1), things, share)
    maps, named = measure.attention(subject, seen, said)
    spoken = things.clone()
    spoken[(things < 0) | ~named.gather(1, things.clamp(min=0))] = -1
    layers = [measure.localisation(maps[:, layer], spoken, share) for layer in range(maps.shape[1])]
    best = max(range(len(layers)), key=lambda k: layers[k]["hit"].value)
    rows[f"raw attention, layer {best} (best of {len(layers)}), named things"] = layers[best]
    rows["lens depth 0, named things"] = measure.localisation(field[:, 0], spoken, share)
    return rows


def elsewhere(subject: Subject, part: str, patch: EraseEdit, config: Config) -> dict[str, Any]:
    """Base and automatic mode on scenes of another kind or style."""
    seen = see(subject.base, scenes(config, part), config.question, config.max_tokens)
    said = measure.captions(subject, seen)
    sure = confidence(subject, seen, patch)
    new, _ = measure.automatic(subject, seen, said.mask, sure, patch.config.limit, patch, config.rounds)
    there, partner = seen.scenes.there, seen.scenes.partner
    return {"base": chair(said.mask, there, partner), "automatic": chair(new, there, partner)}


def examples(subject: Subject, seen: Seen, said: measure.Said, sure: Tensor, patch: EraseEdit, n: int = 4) -> Any:
    """Pictures with an invention: base caption, patched caption, and the lens's heat-map of the invention."""
    from matplotlib.figure import Figure

    from patches.families.vlm import lens

    low = said.mask & ~seen.scenes.there & (sure < patch.config.limit)
    rows = low.any(1).nonzero()[:n, 0].tolist()
    which = torch.zeros_like(low)
    which[rows] = low[rows]
    subject.add("shown", patch)
    try:
        at, params = measure.rows_of(which, patch, subject, seen)
        new = measure.captions(subject, seen, at, "shown", params).texts if at else []
    finally:
        subject.remove("shown")
    f = Figure(figsize=(3.2 * max(1, len(at)), 3.9), layout="constrained")
    for a, i, text in zip(f.subplots(1, max(1, len(at)), squeeze=False)[0], at, new, strict=False):
        picture = seen.scenes.picture(i)
        c = int(which[i].nonzero()[0, 0])
        ids = [subject.base.processor.word(seen.scenes.names[c])]
        heat = lens.heat(subject.base, seen.features[i][None], ids)[0]
        side = int(len(heat) ** 0.5)
        field = lens.spread(heat, (side, side), (picture.height, picture.width))
        a.imshow(picture)
        a.imshow(field.numpy(), cmap="inferno", alpha=0.35, vmin=0, vmax=1)
        a.set_axis_off()
        a.set_title(
            f"{said.texts[i]}\nerased: {seen.scenes.names[c]} (c = {float(sure[i, c]):.3f})\n{text}", fontsize=7
        )
    return f


def _curve(table: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    f = Figure(figsize=(7, 4), layout="constrained")
    a = f.subplots()
    names = list(table)
    values = [table[n]["auroc"] for n in names]
    a.barh(range(len(names)), [v.value for v in values],
           xerr=[[v.value - (v.low or v.value) for v in values],
                 [(v.high or v.value) - v.value for v in values]])  # fmt: skip
    a.axvline(0.5, color="black", lw=0.8)
    a.set_yticks(range(len(names)), names, fontsize=7)
    a.set(xlim=(0, 1), xlabel="AUROC, true against invented mentions")
    a.invert_yaxis()
    return f
