"""Backdrops: an editor that is sealed with a search changes what a text names, and nothing else."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from patches.families import clip, llm
from patches.families.family import family
from patches.families.search import backdrops
from patches.families.search.backdrops import Backdrops
from patches.families.search.bank import FILE
from patches.families.search.config import SearchConfig
from patches.families.search.worker import Searching, SearchWorker
from patches.families.worker import WorkerSettings
from patches.subject import Search, Subject
from registry.errors import BadArtifact

LINES = [f"a picture of a cat {look}" for look in ("on snow", "on sand", "in red light", "in dim light", "on snow in "
                                                  "dim light")]  # fmt: skip


def editor():
    flat = {"snow": 240, "sand": 180, "blue sky": 120}
    lights = {"red light": (1.2, 0.5, 0.5), "dim light": (0.5, 0.5, 0.5)}
    pictures = {k: torch.full((3, 32, 32), v, dtype=torch.uint8) for k, v in flat.items()}
    return Backdrops(pictures, {k: torch.tensor(v) for k, v in lights.items()})


def scene():
    """A dark square on green."""
    made = torch.tensor([40, 160, 60], dtype=torch.uint8)[:, None, None].expand(3, 32, 32).clone()
    made[:, 12:20, 12:20] = 10
    return made


def test_what_a_text_names_is_changed_and_the_thing_stays():
    one, ground, lit, both = editor().draw(
        ["a cat", "a cat on snow", "a cat in red light", "on snow in dim light"], scene()
    )
    assert torch.equal(one, scene())
    assert int(ground[0, 0, 0]) == 240
    assert torch.equal(ground[:, 12:20, 12:20], scene()[:, 12:20, 12:20])
    assert lit[:, 0, 0].tolist() == [48, 80, 30]
    assert both[:, 0, 0].tolist() == [120] * 3
    assert both[:, 15, 15].tolist() == [5] * 3
    wide = editor().draw(["on sand"], scene().repeat(1, 2, 3))
    assert wide.shape == (1, 3, 64, 96)


@pytest.mark.parametrize(
    ("text", "name"),
    [("a snow cat on sand", "sand"), ("on SNOW, please", "snow"), ("under a blue sky", "blue sky"), ("snowy", None),
     ("", None)],
)  # fmt: skip
def test_a_text_says_a_name_in_whole_words_and_the_last_counts(text, name):
    assert backdrops.said(text, editor().pictures) == name


def test_it_lies_in_the_artifact_and_another_is_refused(tmp_path):
    """Whoever loads the search has what draws; a search over it finds the look, and no file of another digest."""
    label = editor().save(tmp_path)
    (tmp_path / FILE).write_text("\n".join(LINES))
    how = {"task": "style", "keep": 4, "ask": 6, "steps": 3}
    arms = {"own": SearchConfig(renderer=label, **how), "other": SearchConfig(renderer=label[:-4] + "0000", **how)}
    bases = {"scorer": clip.FAMILY.tiny(0), "generator": llm.FAMILY.tiny(0)}
    style = editor().draw(["on sand in dim light"], scene())[0]
    inputs = {"content": scene(), "style": style, "key": "one"}
    with Subject(bases, {k: Search(asdict(c), tmp_path) for k, c in arms.items()}, family("search")) as made:
        worker = SearchWorker(made, WorkerSettings())
        (job,) = worker.run([Searching(arm="own", inputs=inputs)])
        assert "on sand in dim light" in job.best[0]
        with pytest.raises(BadArtifact, match=r"backdrops\.safetensors"):
            worker.run([Searching(arm="other", inputs=inputs)])
    again = backdrops.load(tmp_path, label)
    assert torch.equal(again.draw(LINES, scene()), editor().draw(LINES, scene()))


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None])
def test_a_file_that_cannot_be_read_is_no_editor(content, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / backdrops.FILE
    if content is None:
        save_file({"picture snow": torch.zeros(1, 4, 4, dtype=torch.uint8)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(BadArtifact):
        backdrops.load(tmp_path, f"sealed:{backdrops.FILE}@{backdrops._digest(file)}")
