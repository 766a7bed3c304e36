"""One case per system for the page of numbers: bases, an arm, and the same job for base and patched.

Sealed lab artifacts where they ship; else a patch of the size that the system's lab recipe makes, with numbers at
random, for a cost does not depend on what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf

from patches.engine.patch import ONLY, Patch
from patches.families.base import load_base
from patches.families.family import family
from patches.families.llm.worker import Row
from patches.families.vlm.worker import Picture
from patches.families.worker import WorkerSettings
from patches.mechanisms.direction import DirectionEdit
from patches.mechanisms.erase import ROW as ERASED
from patches.mechanisms.erase import EraseEdit
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.mechanisms.subspace import SubspaceEdit
from patches.subject import Subject
from registry.errors import PatchError
from registry.systems import system

SEALED = Path(__file__).parents[2] / "patches" / "lab" / "sealed"
PROMPT, TOKENS = 8, 8
JOBS = {
    "clip": "a picture of 96 x 96", "llm": f"a prompt of {PROMPT} tokens, {TOKENS} more",
    "vlm": f"a picture of 4 tokens, {TOKENS} words", "diffusion": "two guided steps", "video": "one clip",
    "search": "a few lines scored, one round",
}  # fmt: skip
"""what one row is, by family"""


@dataclass(frozen=True)
class Case:
    """A system to be timed."""

    subject: Subject
    worker: Any
    job: Callable[[str | None], Any]
    """arm, or None for the base -> one row"""
    many: bool
    """Whether its arms are patches, so that many can share one batch"""
    note: str
    """What the arm is"""

    def run(self, *arms: str | None) -> None:
        """One batch with a row for each of these arms."""
        self.worker.run([self.job(arm) for arm in arms])


SLOTS = 64


def case(name: str, device: str = "cpu", provider: str = "") -> Case:
    """The case of system `name`; the caller closes its subject. provider: of ONNX Runtime, instead of torch."""
    row = system(name)
    if (SEALED / name).is_dir():
        subject, note = Subject.load(SEALED / name, device=device), "the sealed lab artifact"
    else:
        base = load_base({"attention_sink": "pypi:smollm2"}.get(name, "lab:clip"), row.family, device)
        patch, note = MADE[name](base)
        subject = Subject({"base": base}, {ONLY: patch}, family(row.family))
    return over(subject, row.patch is not None, note, provider)


def over(subject: Subject, many: bool, note: str, provider: str = "") -> Case:
    """A case of what is loaded already."""
    worker = subject.worker(WorkerSettings(slots=SLOTS, provider=provider))
    if provider and (patch := subject.arms.get(ONLY)) is not None:
        worker.prepare(ONLY, patch if isinstance(patch, Patch) else None)
    jobs: dict[str, Callable[[str | None], Any]] = {
        "llm": lambda arm: Row(list(range(3, 3 + PROMPT)), arm=arm, max_tokens=TOKENS, ignore_eos=True),
        "vlm": lambda arm: _told(_seen(worker.probe(None), arm), subject),
        "diffusion": lambda arm: _told(worker.probe(arm), subject),
    }
    return Case(subject, worker, jobs.get(subject.family.name, worker.probe), many, note)


def copy_of(patch: Patch) -> Patch:
    """The same patch with tensors of its own."""
    return type(patch)(patch.config, {k: v.clone() for k, v in patch.tensors.items()})


def foldable(patch: Any) -> Patch | None:
    """What of a patch weights can hold: of a sink patch its neurons without conditions; None if nothing."""
    if isinstance(patch, SinkEdit):
        return SinkEdit(SinkConfig(neurons=patch.config.neurons, keep_first=False), {})
    try:
        patch.weights()
    except (PatchError, AttributeError):
        return None
    return patch if isinstance(patch, Patch) else None


def folded(name: str, patch: Patch) -> Case:
    """The patch in the base's weights, without a hook; a copy of its own, for a base that carries a patch is not
    folded."""
    one = case(name)
    one.subject.close()
    base = replace(one.subject.base, model=patch.fold(one.subject.base.model))
    return over(Subject({"base": base}, {}, one.subject.family), False, "folded")


def _seen(probe: Any, arm: str | None) -> Picture:
    return Picture(probe.prompt, arm=arm, max_tokens=TOKENS, ignore_eos=True, features=probe.features)


def _told(row: Any, subject: Subject) -> Any:
    """A row that says to its mechanism what a request would: three things to erase, two classes, an adapter."""
    patch = None if row.arm is None else subject.arms[row.arm]
    if isinstance(patch, EraseEdit):
        if id(subject) not in _ERASED:
            _ERASED[id(subject)] = patch.directions(subject.base, patch.config.objects[:3])
        row.params = {ERASED: _ERASED[id(subject)]}
    elif isinstance(patch, DirectionEdit):
        row.params = {"class": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    elif isinstance(patch, SubspaceEdit):
        row.params = patch.params(None, subject.base)
    return row


_ERASED: dict[int, torch.Tensor] = {}


def _features(base: Any) -> tuple[Any, str]:
    from patches.families import clip
    from patches.mechanisms.features import SAE, edit

    w = nnf.normalize(torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    sae = SAE(w, torch.zeros(2048), w, torch.zeros(256), "topk", 32, None)
    return edit(sae, clip.site("block", 4), range(250)), "250 features of a dictionary of 2,048, at random"


def _heads(base: Any) -> tuple[Any, str]:
    from patches.families import clip
    from patches.mechanisms.heads import HeadConfig, HeadEdit

    count = base.model.visual.transformer.resblocks[0].attn.heads
    chosen = tuple((layer, head % count) for layer in (4, 5, 6, 7) for head in (0, 1))
    return HeadEdit(HeadConfig(clip.SITES["heads"], chosen, count, "zero"), {}), "eight heads silenced"


def _neurons(base: Any) -> tuple[Any, str]:
    from patches.families import clip
    from patches.mechanisms.neurons import ablate

    return ablate(clip.site("neurons", 5), range(100), torch.zeros(100)), "100 neurons at their mean"


def _sink(base: Any) -> tuple[Any, str]:
    neurons = ((1, 83), (1, 1299), (2, 90), (2, 430), (11, 1229), (11, 1487))
    return SinkEdit(SinkConfig(neurons=neurons, damp_layers=(0,)), {}), "six sink neurons of SmolLM2-135M"


MADE = {"clip_sae": _features, "clip_heads": _heads, "second_order": _neurons, "attention_sink": _sink}
