"""The progression as one sweep: jobs that are locked and resumed, and what its table says of planted numbers."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from registry.errors import ConfigError
from training.lab.video import stages
from training.videomae import progression, table
from training.videomae.pretraining import Size
from training.videomae.progression import NATURAL, ROWS, SCRATCH, Sweep, pack, run

SMALL = Sweep(
    steps=2, batch=4, pool=8, seeds=2, fewest=11, few=11, more=22, few_steps=2, more_steps=2, probe_steps=2, test=22,
    controls=(22,), corrupted=11, size=Size(16, 1, 2, 16, 1, 2, image=16, patch=8, frames=4),
)  # fmt: skip
EVERY = (SCRATCH, NATURAL, *stages.STAGES)


def test_forms_say_how_a_row_is_pre_trained() -> None:
    assert SMALL.plan().mask == "random"
    assert SMALL.plan("tube", 3).mask == "tube"
    assert SMALL.plan("tube", 3).seed == 3
    assert SMALL.plan("keep").still == "keep"
    assert bool((progression.pool("static_circles@keep", SMALL) == progression.pool("static_circles", SMALL)).all())
    with pytest.raises(ConfigError, match="There is no form 'sideways'"):
        SMALL.plan("sideways")


def test_a_sweep_does_every_job_once_and_leaves_those_that_somebody_holds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        progression, "_controls", lambda sweep: [{"row": "control x", "seed": 0, "protocol": "control"}]
    )
    rows = (SCRATCH, "static_circles@keep")
    run(tmp_path, SMALL, rows, measured=False)  # pre-training alone
    assert [json.loads(line)["protocol"] for line in (tmp_path / ROWS).read_text().splitlines()] == ["pretrain"] * 2
    with (tmp_path / f"{SCRATCH}.1.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process would
        run(tmp_path, SMALL, rows)
    lines = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    measured = {(r["row"], r["seed"]) for r in lines if r["protocol"] == "finetune"}
    assert measured == {(SCRATCH, 0), ("static_circles@keep", 0), ("static_circles@keep", 1)}
    run(tmp_path, SMALL, rows)
    again = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert again[: len(lines)] == lines
    assert {(r["row"], r["seed"]) for r in again[len(lines) :]} == {(SCRATCH, 1)}
    kinds = {(r["protocol"], r["labels"]) for r in again if r["row"] == SCRATCH}
    assert {("finetune", 11), ("finetune", 22), ("probe attention", 11), ("probe mean", 22)} <= kinds
    assert ("corrupted reverse", 22) in kinds


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Three seeds of 400 clips: scratch .5, stages rising in steps of .04 with the largest at motion, natural .9."""
    (tmp_path / "sweep.json").write_text(json.dumps(asdict(replace(SMALL, seeds=3))))
    means = {SCRATCH: 0.5, NATURAL: 0.9}
    means |= dict(zip(stages.STAGES, (0.52, 0.66, 0.70, 0.74, 0.78, 0.82, 0.86), strict=True))
    means["static_circles@keep"] = means.pop("static_circles")
    with (tmp_path / ROWS).open("w") as f:
        for row, share in means.items():
            for seed in range(3):
                g = torch.Generator().manual_seed(seed)
                right = torch.rand(400, generator=g) < share + 0.01 * (seed - 1)
                for protocol, labels in (("finetune", 55), ("probe attention", 110)):
                    line = {"row": row, "seed": seed, "protocol": protocol, "labels": labels, "n": 400}
                    f.write(json.dumps({**line, "right": pack(right)}) + "\n")
    return tmp_path


def test_a_planted_progression_is_told(planted: Path) -> None:
    known = {s: {"change": float(i), "black": 1.0} for i, s in enumerate(stages.STAGES)}
    whole = table.table(planted, known)
    about = whole["protocols"]["finetune 55"]
    assert about["progression"]["rho"] == 1
    assert about["progression"]["p"] == pytest.approx(2 / 5040, abs=1e-4)  # one order and its reverse
    assert max(about["steps"], key=lambda s: about["steps"][s][0]) == "moving_circles"
    assert about["statistics"]["change"]["rho"] == 1
    assert about["statistics"]["black"]["rho"] == 0
    assert about["image_crops"]["share"] == pytest.approx(0.9, abs=0.05)
    assert about["image_crops"]["low"] < 0.9 < about["image_crops"]["high"]
    text = table.markdown(whole)
    assert "| scratch (3) |" in text
    assert text.index("| static_circles@keep") < text.index("| image_crops")
    got = table.measures(whole)
    assert got[SCRATCH].keys() == {"finetune 55", "probe attention 110"}
    assert got["image_crops"]["closed finetune 55"].value == about["image_crops"]["share"]
    assert len(table.figure(whole).axes) == 2


def test_the_interval_knows_of_seeds_that_differ() -> None:
    """Two sets with the same mean over clips: where seeds differ the interval is wider."""
    alike = {s: (torch.arange(1000) % 2).float() for s in range(3)}
    apart = {s: (torch.arange(1000) < 1000 * (0.3 + 0.2 * s)).float() for s in range(3)}
    found = {("a", "p", 1): alike, ("b", "p", 1): apart}
    drawn = table.draws(found)
    widths = [n.high - n.low for n in (table.number(found[k], drawn[k]) for k in found)]
    assert widths[1] > 2 * widths[0]


def test_the_whole_is_written_and_logged(planted: Path, home, monkeypatch, capsys) -> None:
    from registry.store.mlflow_client import connected

    monkeypatch.setattr(table, "described", lambda folder: (folder / table.STATISTICS).write_text("{}") and {})
    table.main(planted)
    table.main(planted)  # once
    said = capsys.readouterr().out
    assert "finetune, 55" in said
    assert (planted / "progression.png").stat().st_size > 10_000
    with connected() as client:
        (experiment,) = [e for e in client.search_experiments() if e.name == "patchbay/sweeps"]
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [r for r in runs if "sweep.digest" in r.data.tags]
        assert {f.path for f in client.list_artifacts(parent.info.run_id, "figures")} == {"figures/progression.png"}
        rows = {r.data.tags["row"]: r.data.metrics for r in runs if "row" in r.data.tags}
    assert rows.keys() == {SCRATCH, NATURAL, "static_circles@keep", *stages.STAGES[1:]}
    assert rows[NATURAL]["finetune 55"] == pytest.approx(0.9, abs=0.04)
    assert len(runs) == 10
