"""What `fit --help` and its errors list, read from the source, is what the jobs have; the nearest comes first."""

import subprocess
import sys
from dataclasses import fields

import pytest

from registry import cli, recipes
from registry.errors import nearest
from registry.systems import SYSTEMS

READY = [name for name, row in SYSTEMS.items() if not row.planned]


@pytest.mark.parametrize("name", READY)
def test_recipes_and_keys_are_those_of_the_job(name):
    job, there = SYSTEMS[name].load_job(), recipes.offer(name)
    assert list(there.recipes) == list(job.RECIPES)
    assert set(there.keys) == {f.name for f in fields(job.Config)}
    assert there.default in job.RECIPES


def test_help_lists_every_recipe_and_of_a_system_its_keys():
    def told(*words):
        done = subprocess.run(
            [sys.executable, "-m", "registry.cli", *words], capture_output=True, text=True, check=True
        )
        return done.stdout

    everything = told("fit", "--help")
    for name in READY:
        assert all(f"{name}/{recipe}" in everything for recipe in recipes.offer(name).recipes)
    one = told("fit", "clip_sae", "--help")
    assert "clip_sae/lab" in one
    assert "  bound: float = 0.01" in one
    assert "toto/" not in one


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fit", "clip_sea/lab"), r"no system 'clip_sea'. Systems: clip_sae, "),
        (("fit", "clip_sae/typographc"), "no recipe 'typographc'. Recipes: "),
        (("fit", "clip_sae/lba"), "no recipe 'lba'. Recipes: lab, "),
        (("fit", "clip_sae/tiny", "test_image=4"), r"no key 'test_image' \(got 4\). Keys: test_images, "),
        (("fit", "clip_sae/tiny", "gates.step=4"), r"no key 'gates.step' \(got 4\). Keys: steps, "),
        (("report", "w2v"), "Systems: w2w, "),
        (("split", "clip_sae", "sha256:" + "a" * 64, "0.5", "min_m=3"), "min_n"),
    ],
)
def test_an_error_lists_the_nearest_first(words, says, capsys, home, monkeypatch):
    import re

    from registry.verbs import decide

    monkeypatch.setattr(decide, "check_digest", lambda *_: None)
    assert cli.main(list(words)) in (1, 2)
    assert re.search(says, capsys.readouterr().err)


def test_many_names_are_cut():
    assert nearest("b", [f"a{i}" for i in range(50)]).endswith("and 10 more")
