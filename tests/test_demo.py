"""`make demo` as it is typed, and what ships for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import demo_tour
from patches import artifact
from patches.evidence import read_evidence
from registry import manifest
from registry.systems import SYSTEMS
from training import run
from training.evidence import recipe_of

ROOT = Path(__file__).parents[1]
CPU_SECONDS = 600
"""Most seconds that the demo's processes may use together; ten minutes of one core end in ten minutes of two"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flag", ["--once", "--fast"])
def test_the_demo_ends_within_its_budget_and_shows_every_system(flag, tmp_path):
    env = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "said.txt").open("w") as file:
        command = [sys.executable, "docs/demo.py", flag]
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
    said = (tmp_path / "said.txt").read_text()
    print(said)  # where the time went
    assert code == 0, said[-3000:]
    total = re.search(r"in all\W+(\d+)\W+(\d+)", said)
    assert total is not None
    assert int(total[2]) <= CPU_SECONDS
    assert [name for name in SYSTEMS if name not in said] == []


@pytest.mark.parametrize("name", sorted(f.name for f in demo_tour.DEMO.iterdir()))
def test_what_ships_for_the_demo_is_what_its_recipe_says_now(name):
    folder = demo_tour.DEMO / name
    about = manifest.read(folder)
    sealed = recipe_of(folder, about)
    assert sealed.name == f"{name}/demo"
    assert sealed.config == SYSTEMS[name].load_job().RECIPES["demo"]
    assert read_evidence(folder)["chosen"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(f.name for f in demo_tour.DEMO.iterdir()))
def test_what_ships_for_the_demo_is_what_its_fit_makes(name):
    made = run.fit(f"{name}/demo")
    assert artifact.load(made)[1].config == artifact.load(demo_tour.DEMO / name)[1].config
