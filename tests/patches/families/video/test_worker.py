"""The video worker: one forward for many wishes, rollouts frame by frame, refusals that name what would do."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from patches.engine.patch import apply
from patches.families.video import Clip, VideoWorker, tiny
from patches.families.video.table import EXAMPLE
from patches.families.worker import WorkerSettings
from patches.subject import Model, Subject
from registry.errors import Failed, Invalid


def worker(kind: str = "videomae", seed: int = 0) -> VideoWorker:
    base = tiny(seed, kind)
    return VideoWorker(base, apply(base.model, {}, root=base.root))


def clip(w: VideoWorker, seed: int = 0, **about) -> Clip:
    g = torch.Generator().manual_seed(seed)
    m = w.model
    return Clip(torch.randint(0, 256, (m.frames, 3, m.size, m.size), generator=g, dtype=torch.uint8), **about)


def objects() -> torch.Tensor:
    out = torch.zeros(16, 16, dtype=torch.int64)
    out[4:12, 4:12] = 1
    return out


@pytest.mark.parametrize("kind", ["videomae", "toto"])
def test_a_clip_is_answered_the_same_alone_and_in_company(kind: str) -> None:
    w = worker(kind)
    last = "reconstruction" if kind == "videomae" else "rollout"
    wants = ("features", "tokens", "scores", "surprise", "track", last)
    jobs = w.run([clip(w, i, wants=wants, objects=objects()) for i in range(5)])
    alone = w.run([clip(w, 3, wants=wants, objects=objects())])[0]
    for name in ("out", "tokens", "scores", "surprise", "made", "tracked"):
        torch.testing.assert_close(getattr(jobs[3], name), getattr(alone, name), atol=1e-5, rtol=1e-4)
    assert {j.finished for j in jobs} == {"stop"}
    assert w.idle


def test_layers_are_those_of_the_model() -> None:
    w = worker()
    first, last = w.run([clip(w, wants=("tokens",), layer=0), clip(w, wants=("tokens",))])
    states = w.model(clips=first.video[None])["states"]
    torch.testing.assert_close(first.tokens, states[0][0])
    torch.testing.assert_close(last.tokens, states[-1][0])


def test_a_rollout_takes_a_step_a_frame_and_can_be_stopped() -> None:
    w = worker("toto")
    seen = []
    job = clip(w, wants=("rollout",), given=1, on_step=lambda j: seen.append(len(j.made)))
    w.add([job])
    lengths = []
    while not w.idle:
        for j in w.step():
            lengths.append(len(j.made))
    assert lengths == [2, 3, 4]
    long = clip(w, wants=("rollout",), given=1)
    w.add([long])
    w.step()
    w.cancel(long)
    assert long.finished == "cancelled"
    assert w.idle


REFUSED = [
    ("videomae", {"wants": ("rollout",)}, "predicts no future"),
    ("toto", {"wants": ("reconstruction",)}, "ask for a rollout"),
    ("toto", {"wants": ("rollout",), "given": 4}, "from 1 to 3"),
    ("videomae", {"wants": ("scores",), "layer": 9}, "0 .the embedding. to 2"),
    ("videomae", {"wants": ("track",)}, "objects must be a mask"),
    ("videomae", {"wants": ("reconstruction",), "ratio": 1.0}, r"0\.05 to 0\.95"),
]


@pytest.mark.parametrize(("kind", "about", "message"), REFUSED)
def test_what_cannot_be_answered_is_refused_before_it_is_queued(kind: str, about: dict, message: str) -> None:
    w = worker(kind)
    with pytest.raises(Invalid, match=message):
        w.add([clip(w, **about)])
    assert w.idle


def test_a_clip_of_another_shape_is_refused() -> None:
    w = worker()
    with pytest.raises(Invalid, match=r"shape \(4, 3, 16, 16\)"):
        w.add([Clip(torch.zeros(3, 3, 16, 16, dtype=torch.uint8))])


def test_weights_that_are_not_finite_fail_their_clips_and_nothing_else() -> None:
    w = worker()
    with torch.no_grad():
        w.model.blocks[0].output.dense.weight[:] = torch.nan
    w.add([clip(w)])
    (done,) = w.step()
    assert done.finished == "failed"
    assert isinstance(done.error, Failed)


def test_arms_that_are_models_answer_as_they_do_alone() -> None:
    base, other = (replace(tiny(s), family="video") for s in (0, 1))
    subject = Subject(base, {"other": Model(other)})
    fleet = subject.worker(WorkerSettings())
    w = worker()
    jobs = fleet.run([clip(w, arm=None, wants=("scores",)), clip(w, arm="other", wants=("scores",))])
    torch.testing.assert_close(jobs[0].scores, w.run([clip(w, wants=("scores",))])[0].scores)
    torch.testing.assert_close(jobs[1].scores, worker(seed=1).run([clip(w, wants=("scores",))])[0].scores)
    assert torch.equal(fleet.proof("other", 0.0), fleet.proof("other"))
    assert not torch.equal(fleet.proof("other"), fleet.proof(None))


def test_the_table_answers_a_clip() -> None:
    base = replace(tiny(), family="video")
    made = Subject(base).predict(pd.DataFrame({"clip": [EXAMPLE]}), {})
    assert made["label"][0] in base.model.classes
    with pytest.raises(Invalid, match="Row 0: .*base64"):
        Subject(base).predict(pd.DataFrame({"clip": ["!!"]}), {})


@pytest.mark.slow
def test_onnx_runtime_answers_as_torch(tmp_path) -> None:
    from patches.families.video.onnx import Engine, export

    base = replace(tiny(), family="video")
    export(base, tmp_path)
    engine = Engine(tmp_path)
    video = torch.stack([clip(worker(), i).video for i in range(3)])
    features, scores = engine(video)
    out = base.model(clips=video)
    torch.testing.assert_close(features, out["states"][-1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(scores, out["scores"], atol=1e-4, rtol=1e-3)
