"""What every job must be, proved over the table: its four names, a tiny fit, the same digest twice, one evaluation."""

import math
import time
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from registry import manifest
from registry.errors import BadArtifact
from registry.gate import LATENCY
from registry.systems import SYSTEMS
from training import run
from training.evidence import recipe_of

SHIPPED = sorted((Path(__file__).parents[2] / "patches" / "lab").glob("*/*/recipe.json"))
READY = [name for name, row in SYSTEMS.items() if not row.planned]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """system -> the folder its tiny recipe made, fitted once for this file."""
    made = {}

    def fit(name):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp(name)))
                made[name] = run.fit(f"{name}/tiny")
        return made[name]

    return fit


@pytest.mark.parametrize("name", READY)
def test_a_job_has_its_names(name):
    job = SYSTEMS[name].load_job()
    assert is_dataclass(job.Config)
    assert job.Config.__dataclass_params__.frozen
    assert {"tiny", "paper"} <= job.RECIPES.keys()
    assert all(isinstance(c, job.Config) for c in job.RECIPES.values())
    assert callable(job.fit)
    assert callable(job.evaluate)
    for recipe, config in job.RECIPES.items():
        said = job.promises(recipe, config)
        assert len(said) > 1, f"{recipe} promises too little"
        assert said[-1].metric == LATENCY
    assert SYSTEMS[name].paper in job.__doc__
    assert f"patchbay fit {name}/" in job.__doc__


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.parent.name)
def test_what_ships_sealed_can_be_measured_again(file):
    """Its recipe is one that this tree knows, whatever keys have come or gone since."""
    about = manifest.read(file.parent)
    recipe = recipe_of(file.parent, about)
    assert recipe.name.startswith(f"{about.system}/")
    assert SYSTEMS[about.system].load_job().promises(recipe.name.split("/")[1], recipe.config)


@pytest.mark.parametrize("name", ["toto", "clip_heads"])
def test_a_recipe_of_another_version_says_so(name, tmp_path):
    (tmp_path / "recipe.json").write_text(f'{{"recipe": "{name}/lab", "config": {{"gone": 1}}}}')
    about = manifest.write(tmp_path, kind="model", system=name, base="tiny:0@" + "f" * 64, config={})
    with pytest.raises(BadArtifact, match=r"sealed by a version .*'gone'.*fit it again"):
        recipe_of(tmp_path, about)


@pytest.mark.parametrize("name", READY)
def test_the_tiny_recipe_makes_a_sealed_artifact_of_this_system(name, fits):
    about = manifest.read(fits(name))
    assert about.system == name
    assert about.kind == ("patch" if SYSTEMS[name].patch else about.kind)
    assert run.RECIPE in about.files


@pytest.mark.parametrize("name", READY)
def test_the_same_recipe_gives_the_same_digest(name, fits, monkeypatch, tmp_path):
    first = manifest.read(fits(name)).digest
    monkeypatch.setenv("PATCHBAY_HOME", str(tmp_path / "again"))
    start = time.process_time()
    assert manifest.read(run.fit(f"{name}/tiny")).digest == first
    assert time.process_time() - start < 20  # 5 s of a quiet core are the aim


@pytest.mark.parametrize("name", READY)
def test_base_and_patched_are_measured_by_the_same_finite_metrics(name, fits):
    got = run.evaluate(fits(name))
    base, patched = got.sides["base"], got.sides["patched"]
    assert base.keys() == patched.keys()
    assert base
    assert all(math.isfinite(m.value) for m in (*base.values(), *patched.values()))
    assert all(key.split("/")[0] in ("quality", "target", "offtarget") for key in base)
    assert got.figures["base"].keys() == got.figures["patched"].keys() != set()
    assert all(isinstance(f, Figure) for side in got.figures.values() for f in side.values())
