"""The full report: the sealed search on test beside its baselines at equal calls, and how fast it is beside the
published loop."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from patches.engine.patch import ONLY
from patches.families.search.config import SearchConfig
from patches.subject import Search, Subject
from registry import config as configs
from registry import manifest
from registry.measure import Measure
from training.evidence import Draft
from training.mils import measure
from training.mils.config import Config
from training.mils.fit import sealed
from training.tasks.intervals import mean

OFFICIAL_ITEMS = 1
"""items of the published loop, which takes one after the other"""


def report(folder: Path, config: Config) -> dict[str, Any]:
    """On config.items of test: the best line of the bank, random lines and mutation at as many scorer calls, the search
    itself, with a patch on the scorer the same without it; paired differences in F1; both loops' pace."""
    about = manifest.read(folder)
    search = configs.parse(SearchConfig, about.config)
    captioner = sealed(config.captioner) if config.captioner else None  # found before the hour, not after it
    arms = {ONLY: search, "random": replace(search, generator="random")}
    if search.generator != "mutation":
        arms["mutation"] = replace(search, generator="mutation")
    if search.patched:
        arms["unpatched"] = replace(search, patched=())
    subject = Subject.load(folder, device=config.device)
    for name, other in arms.items():
        if name != ONLY:
            subject.add(name, Search(asdict(other), folder))
    draft = Draft(about)
    task = measure.task_of(config, subject.bases["scorer"], "test", config.items)
    worth: dict[str, list[float]] = {}
    for name in ("bank", *arms):
        arm, strength = (ONLY, 0.0) if name == "bank" else (name, 1.0)
        done = measure.run(subject, task, arm, strength)
        draft.keep(
            "test",
            name,
            value={
                **measure.metrics(done),
                **measure.spent(done),
                "seconds_an_item": Measure(done.seconds / len(task.inputs), n=len(task.inputs)),
            },
        )
        worth[name] = measure.worth(done, done.texts)
        if name == ONLY:
            by_round = {k: mean(measure.worth(done, done.texts_at(k))) for k in range(search.steps + 1)}
            draft.keep("worth_by_round", value=by_round)
            draft.keep("examples", value=[list(pair) for pair in zip(done.texts[:8], task.true[:8], strict=True)])
        if name != "bank":
            less = [a - b for a, b in zip(worth[name], worth["bank"], strict=True)]
            draft.keep("minus_bank", name, value=mean(less))
    subject.close()
    if captioner is not None and task.pictures is not None:
        for name, texts in captioned(captioner, task.pictures, config.device).items():
            draft.keep("test", name, value=measure.judged(task, texts))
    if config.pace:
        draft.keep("pace", value=pace(folder, config))
    return draft


def captioned(captioner: Path, pictures: Tensor, device: str) -> dict[str, list[str]]:
    """Captions of a vision-language model and of its patch for uint8 pictures (n, 3, H, W)."""
    import pandas as pd
    from torchvision.transforms.functional import to_pil_image

    from patches.families.pictures import png

    subject = Subject.load(captioner, device=device)
    frame = pd.DataFrame({"image": [png(to_pil_image(x)) for x in pictures]})
    out = {name: list(subject.predict(frame, {"strength": s})) for name, s in (("vlm", 0.0), ("vlm patched", 1.0))}
    subject.close()
    return out


def pace(folder: Path, config: Config, n: int = OFFICIAL_ITEMS) -> dict[str, Measure]:
    """Captions a minute of the same search in both loops, in one process, each with nothing encoded before."""
    search = configs.parse(SearchConfig, manifest.read(folder).config)
    out = {}
    for how in ("official", "shared"):
        subject = Subject.load(folder, device=config.device)
        subject.add("timed", Search(asdict(replace(search, how=how)), folder))
        many = n if how == "official" else max(n, min(config.items, 8 * n))
        task = measure.task_of(config, subject.bases["scorer"], "test", many)
        done = measure.run(subject, task, "timed")
        out[how] = Measure(60 * many / done.seconds, n=many, better="higher")
        subject.close()
    return {**out, "ratio": Measure(out["shared"].value / out["official"].value, n=n, better="higher")}
