"""videomae: what is drawn is what is said, training goes on after a kill, two processes train as one, tables add up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from registry.errors import BadArtifact, Conflict, NotFound
from training.lab.video import actions, stages
from training.lab.video.corruptions import CORRUPTIONS, corrupt
from training.lab.video.statistics import frechet, spectrum, statistics
from training.tasks import motion
from training.videomae.pretraining import Plan, Size, batch_of, new, pretrain
from training.videomae.progression import pack, unpack
from training.videomae.table import closed, spearman
from training.videomae.tuning import classifier, groups

SMALL = Size(16, 2, 2, 16, 1, 2, image=16, patch=8, frames=4)
ROOT = Path(__file__).parents[3]


# ---- what is drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_is_a_function_of_its_seed(stage: str) -> None:
    a, b, c = (stages.draw(stage, n, s, frames=4, size=16, objects=12) for n, s in ((3, 0), (5, 0), (3, 1)))
    assert torch.equal(a, b[:3])
    assert not torch.equal(a, c)
    moving = float((a[:, 1:].float() - a[:, :-1].float()).abs().mean())
    assert (moving == 0) == (stage == "static_circles")


def test_an_object_moves_as_published() -> None:
    """Speed as a share of the side per sampled frame: 1.2 to 3 px of 256 per raw frame, 61 raw frames a clip."""
    _, centre, _ = stages._motion(1, stages.generator("x"), 8, 200)
    step = (centre[:, :, 1:] - centre[:, :, :-1]).norm(dim=-1)
    assert float(step.min()) == pytest.approx(1.2 * 61 / 8 / 256, rel=0.05)
    assert float(step.max()) == pytest.approx(3.0 * 61 / 8 / 256, rel=0.05)
    assert torch.allclose(step[..., :1].expand_as(step), step, atol=1e-5)  # constant
    _, faster, _ = stages._motion(4, stages.generator("x"), 8, 200)
    change = (faster[:, :, 2:] - 2 * faster[:, :, 1:-1] + faster[:, :, :-2]).norm(dim=-1)
    assert float(change.max()) == pytest.approx(0.06 * (61 / 8) ** 2 / 256, rel=0.05)


def test_polygons_lie_in_the_unit_disc_and_hold_their_middle() -> None:
    kind = torch.randint(6, (4, 50), generator=torch.Generator().manual_seed(0))
    normal, offset = stages._polygons(kind, torch.Generator().manual_seed(1))
    even = (kind != 5) & (kind != 3)
    assert bool((offset[even] > 0.2).all())
    assert float(offset.max()) <= 1.0001
    assert normal.shape == (4, 50, 4, 2)


def test_stages_that_do_not_exist_are_refused() -> None:
    with pytest.raises(NotFound, match="static_circles"):
        stages.draw("squares", 1)


def test_the_middle_frame_says_nothing_of_the_class() -> None:
    thing = actions.things(torch.zeros(11, dtype=torch.int64), torch.Generator().manual_seed(0), size=(0.3, 0.3))
    same = actions.replace(thing, **{k: getattr(thing, k)[:1].expand(11, *getattr(thing, k).shape[1:])
                                     for k in ("centre", "size", "turn", "mirror", "tint")})  # fmt: skip
    centre, size, turn = actions._moved(same, torch.arange(11), 8, torch.Generator().manual_seed(1))
    assert float((centre[:, 4] - centre[0, 4]).abs().max()) < 1e-5
    assert float((size[:, 4] - size[0, 4]).abs().max()) < 1e-6
    assert float((turn[:, 4] - turn[0, 4]).abs().max()) < 1e-6
    moves = (
        (centre[:, -1] - centre[:, 0]).norm(dim=-1)
        + (size[:, -1] - size[:, 0]).abs()
        + (turn[:, -1] - turn[:, 0]).abs()
    )
    still, swing = actions.MOTIONS.index("still"), actions.MOTIONS.index("swing")
    assert float(moves[still]) == 0
    assert all(float(m) > 0.05 for i, m in enumerate(moves) if i not in (still, swing, actions.MOTIONS.index("bounce")))


def test_clips_have_three_to_five_things_and_splits_share_no_sprite() -> None:
    clips = actions.draw("test", 22, frames=4, size=24)
    assert torch.equal(torch.bincount(clips.label, minlength=11), torch.full((11,), 2))
    assert torch.equal(actions.draw("test", 5, frames=4, size=24).video, clips.video[:5])
    assert int(clips.mask.amax((1, 2, 3)).min()) >= 2
    assert int(clips.mask.max()) <= 5


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_change_a_clip_and_keep_its_form(kind: str) -> None:
    video = actions.draw("test", 4, frames=6, size=24).video
    worse = corrupt(video, kind)
    assert worse.shape == video.shape
    assert worse.dtype == torch.uint8
    assert not torch.equal(worse, video)
    assert torch.equal(worse, corrupt(video, kind))


def test_statistics_know_noise_and_themselves() -> None:
    clips = stages.draw("moving_circles", 16, frames=4, size=16, objects=12)
    own = statistics(clips, clips)
    assert own["distance"] == pytest.approx(0, abs=1e-3)
    assert own["colour"] == pytest.approx(0, abs=1e-6)
    assert spectrum(torch.rand(64, 3, 32, 32)) == pytest.approx(0, abs=0.1)  # white
    a = torch.randn(4000, 3, dtype=torch.float64)
    assert frechet(a, a + torch.tensor([3.0, 0, 0], dtype=torch.float64)) == pytest.approx(9, abs=0.1)


# ---- training ----------------------------------------------------------------------------------------------------


def test_a_masked_model_learns_what_it_can_see() -> None:
    pool = stages.draw("moving_circles", 8, frames=4, size=16, objects=8)
    _, log = pretrain(pool, SMALL, Plan(steps=150, batch=16, ratio=0.5, peak=3e-3, still="keep"))
    assert log["loss"][-1] < 0.8 * log["loss"][0]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    pool = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1, 1).expand(6, 4, 3, 16, 16)
    plan = Plan(batch=4, seed=5)
    for a, b in zip(batch_of(pool, SMALL, plan, 7), batch_of(pool, SMALL, plan, 7), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(batch_of(pool, SMALL, plan, 7)[1], batch_of(pool, SMALL, plan, 8)[1])


RUN = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from training.lab.video import stages
from training.videomae.pretraining import Plan, Size, pretrain
import training.videomae.pretraining as p, time, os
torch.set_num_threads(1)
pool = stages.draw("moving_circles", 16, frames=4, size=16, objects=8)
slow = float(sys.argv[3])
def say(step, loss):
    if step >= 20: time.sleep(slow)
net, _ = pretrain(pool, Size(16, 2, 2, 16, 1, 2, image=16, patch=8, frames=4), 
    Plan(steps=60, batch=8, save_every=10), Path(sys.argv[1]), say=say)
save_file(dict(net.state_dict()), sys.argv[2])
"""


def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(folder: str, out: str, slow: float):
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / folder), str(tmp_path / out), str(slow)], env=env
        )

    assert start("whole", "whole.safetensors", 0).wait(120) == 0
    killed = start("cut", "cut.safetensors", 300)
    for _ in range(1200):
        if (tmp_path / "cut" / "state.json").is_file() and json.loads((tmp_path / "cut" / "state.json").read_text())[
            "step"
        ] >= 20:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    assert not (tmp_path / "cut.safetensors").exists()
    assert start("cut", "cut.safetensors", 0).wait(120) == 0
    whole, cut = (load_file(tmp_path / f"{n}.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_a_run_that_is_stopped_thrice_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """More than ten weights: "10" comes before "2" in a file, and each weight must get its own moments back."""
    pool = stages.draw("moving_circles", 8, frames=4, size=16, objects=8)
    plan = Plan(steps=200, batch=4, save_every=5)
    whole, _ = pretrain(pool, SMALL, plan)

    class Stopped(Exception):
        pass

    for stop in (50, 100, 150):

        def say(step: int, loss: float, stop: int = stop) -> None:
            if step >= stop:
                raise Stopped

        with pytest.raises(Stopped):
            pretrain(pool, SMALL, plan, tmp_path, say=say)
    cut, _ = pretrain(pool, SMALL, plan, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True))


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    pool = stages.draw("moving_circles", 8, frames=4, size=16, objects=8)
    pretrain(pool, SMALL, Plan(steps=3, batch=4, save_every=2), tmp_path)
    with pytest.raises(Conflict, match="another plan"):
        pretrain(pool, SMALL, Plan(steps=4, batch=4, save_every=2), tmp_path)


TWO = """
import sys, torch
from accelerate import Accelerator
from safetensors.torch import save_file
from training.lab.video import stages
from training.videomae.pretraining import Plan, Size, pretrain
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == int(sys.argv[2])
pool = stages.draw("moving_circles", 16, frames=4, size=16, objects=8)
net, _ = pretrain(pool, Size(16, 2, 2, 16, 1, 2, image=16, patch=8, frames=4), 
    Plan(steps=6, batch=8), accelerator=accelerator)
if accelerator.is_main_process:
    save_file({k: v.clone() for k, v in net.state_dict().items()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    (tmp_path / "two.py").write_text(TWO)
    one = subprocess.run([sys.executable, tmp_path / "two.py", tmp_path / "1.safetensors", "1"], env=env, check=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531"]
    two = subprocess.run([*command, tmp_path / "two.py", tmp_path / "2.safetensors", "2"], env=env, check=False)
    assert one.returncode == two.returncode == 0
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-2)


def test_layers_learn_slower_the_farther_down_they_are() -> None:
    net = classifier(SMALL, 11)
    by_rate = {round(g["peak"], 6): len(g["params"]) for g in groups(net, 1.0, 0.5)}
    assert sorted(by_rate, reverse=True) == [1.0, 0.5, 0.25, 0.125]
    assert by_rate[0.125] == 2  # the patch embedding
    assert sum(by_rate.values()) == len(list(net.parameters()))


def test_a_classifier_takes_the_encoder_and_nothing_else() -> None:
    encoder = new(SMALL, 3).videomae
    net = classifier(SMALL, 11, encoder)
    assert torch.equal(net.videomae.encoder.layer[1].output.dense.weight, encoder.encoder.layer[1].output.dense.weight)
    with pytest.raises((BadArtifact, RuntimeError)):
        classifier(Size(16, 3, 2, 16, 1, 2, image=16, patch=8, frames=4), 11, encoder)


def test_probes_read_what_is_planted() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 3
    x = torch.randn(300, 5, 8, generator=g)
    x[torch.arange(300), torch.randint(5, (300,), generator=g), label] += 12  # at any one token
    for pooling in ("attention", "mean"):
        probe = motion.probe(x[:200], label[:200], pooling, 150, classes=3)
        assert float((motion.answers(probe, x[200:]) == label[200:]).float().mean()) > 0.9


# ---- tables ------------------------------------------------------------------------------------------------------


def test_bits_come_back() -> None:
    right = torch.rand(37) > 0.5
    assert torch.equal(unpack(pack(right), 37), right)


def test_a_share_of_no_gap_is_undefined_in_print() -> None:
    g = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(3, 1000, generator=g)
    scratch, natural, stage = 0.5 + noise[0], 0.53 + noise[1], 0.52 + noise[2]
    assert closed(stage, scratch, natural, (0.52, 0.5, 0.53))["share"] == "undefined"
    wide = closed(stage + 0.2, scratch, natural + 0.3, (0.72, 0.5, 0.83))
    assert wide["share"] == pytest.approx(0.667, abs=0.01)
    assert wide["low"] < wide["share"] < wide["high"]


def test_rank_correlation() -> None:
    assert spearman([0, 1, 2, 3], [0.1, 0.2, 0.3, 0.9]) == pytest.approx(1)
    assert spearman([0, 1, 2, 3], [4, 3, 2, 1]) == pytest.approx(-1)
