"""A diffusion base as what draws: the same text draws the same picture, in slices that can stop."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from patches.families import clip, llm
from patches.families.base import load_base
from patches.families.family import family
from patches.families.search.bank import FILE
from patches.families.search.config import SearchConfig
from patches.families.search.draw import Diffusion
from patches.families.search.worker import Searching, SearchWorker
from patches.families.worker import WorkerSettings
from patches.subject import Search, Subject
from registry.errors import NotReady, WrongBase

from .world import LINES

TEXTS = ["a cat", "a dog on sand", "a cat", "an owl", "a fox"]


@pytest.fixture(scope="module")
def base():
    return load_base("tiny:0", "diffusion")


def test_a_text_draws_one_picture_whoever_is_beside_it(base):
    drawer = Diffusion(base, steps=2)
    made = drawer.draw(TEXTS)
    assert made.dtype == torch.uint8
    assert made.shape == (5, 3, *base.model.size)
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])
    alone = Diffusion(base, steps=2).draw(["an owl"])[0].int()
    assert (alone - made[3].int()).abs().max() <= 1


def test_a_picture_is_changed_and_stays_near(base):
    drawer = Diffusion(base, steps=4)
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8) + 128
    one, other = drawer.draw(["a cat", "a dog on sand"], picture)
    assert not torch.equal(one, other)
    assert not torch.equal(one, drawer.draw(["a cat"])[0])


def test_drawing_stops_between_two_denoiser_steps(base):
    drawer = Diffusion(base, steps=3)
    drawing = drawer.drawing(TEXTS)
    for _ in range(len(set(TEXTS)) + 2):
        next(drawing)
    assert not drawer.worker.idle
    drawing.close()
    assert drawer.worker.idle
    assert torch.equal(drawer.draw(TEXTS[:1]), Diffusion(base, steps=3).draw(TEXTS[:1]))


def subject(tmp_path, **configs):
    (tmp_path / FILE).write_text("\n".join(LINES))
    bases = {"scorer": clip.FAMILY.tiny(0), "generator": llm.FAMILY.tiny(0)}
    return Subject(bases, {k: Search(asdict(c), tmp_path) for k, c in configs.items()}, family("search"))


def test_a_search_rewrites_prompts_for_a_diffusion_base(base, tmp_path):
    """The configuration names the base, so whoever loads the artifact has what draws."""
    how = {"task": "prompt", "keep": 3, "ask": 2, "steps": 2, "lines": 3, "drawn": 2}
    made = subject(
        tmp_path, draws=SearchConfig(renderer=base.label, **how), none=SearchConfig(**how),
        other=SearchConfig(renderer="tiny:0@" + 64 * "0", **how),
    )  # fmt: skip
    worker = SearchWorker(made, WorkerSettings())
    goal = {"inputs": {"goal": "a cat"}, "goal": "a cat", "start": ("a cat",)}
    (job,) = worker.run([Searching(arm="draws", **goal)])
    track = job.item.track
    assert track.calls == 8
    assert track.curve() == sorted(track.curve())
    assert track.curve()[-1] >= track.found["a cat"].score
    for arm, error in (("other", WrongBase), ("none", NotReady)):
        with pytest.raises(error):
            worker.run([Searching(arm=arm, **goal)])
    stopped = Searching(arm="draws", key="1", inputs={"goal": "an owl in a jar"}, start=("an owl in a jar",))
    worker.add([stopped])
    for _ in range(3):
        worker.step()
    worker.cancel(stopped)
    assert worker.idle
    made.close()
