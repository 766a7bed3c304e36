"""The worker of searches on tiny bases: arms are configurations, strength 0 is retrieval, what cannot be is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from patches import artifact
from patches.families import clip, llm
from patches.families.family import family
from patches.families.search import worker as worker_module
from patches.families.search.bank import FILE, bank
from patches.families.search.config import Budget, SearchConfig
from patches.families.search.scorers import BATCH, Clip
from patches.families.search.track import digest
from patches.families.search.worker import Searching, SearchWorker, answer
from patches.families.worker import WorkerSettings
from patches.subject import Search, Subject
from registry.errors import BadArtifact, Invalid

from .world import LINES

ARMS = {
    "plain": SearchConfig(keep=6, ask=6, steps=3),
    "long": SearchConfig(keep=6, ask=6, steps=60),
    "llm": SearchConfig(generator="llm", keep=4, ask=2, steps=1),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    (folder / FILE).write_text("\n".join(LINES))
    bases = {"scorer": clip.FAMILY.tiny(0), "generator": llm.FAMILY.tiny(0)}
    bases["generator"].model.config.max_position_embeddings = 4096
    made = Subject(bases, {k: Search(asdict(c), folder) for k, c in ARMS.items()}, family("search"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def worker(subject):
    return SearchWorker(subject, WorkerSettings())


def picture(seed=0, frames=1):
    return {"pixels": torch.randn(frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def test_a_texts_features_are_its_own_whoever_is_beside_it(subject):
    """Bit for bit, at any place of any batch: what makes traces independent of batching."""
    scorer = Clip(subject.bases["scorer"])
    target = scorer.target(picture())
    alone = scorer.encode(["a cat on sand"], target)[0]
    for place in (0, 7, BATCH - 1):
        texts = list(LINES[:BATCH])
        texts[place] = "a cat on sand"
        assert torch.equal(scorer.encode(texts, target)[place], alone)


def test_a_search_is_better_than_the_bank_and_strength_0_is_the_bank(worker):
    jobs = [Searching(arm="plain", inputs=picture(i), strength=s) for i in range(3) for s in (1.0, 0.0)]
    worker.run(jobs)
    for full, none in zip(jobs[::2], jobs[1::2], strict=True):
        assert none.best[0] in LINES
        assert none.item.track.step == 1
        assert answer(full).score >= answer(none).score
        assert full.finished == "stop"
        assert full.told == {"step": 3, "steps": 3, "calls": full.item.track.calls, "tokens": 0, "why": "steps"}
        assert list(answer(full).curve) == sorted(answer(full).curve)


def test_progress_is_told_while_the_bank_is_read_and_rises_to_one(worker, monkeypatch):
    """Reading a large bank is most of a first search: without a word it looks hung."""
    monkeypatch.setattr(worker_module, "TELL_S", 0.0)
    worker.texts.clear()
    for scorer in worker.scorers.values():
        scorer.kept.clear()
    job = Searching(arm="plain", inputs=picture(6))
    seen = []

    def tell(j):
        seen.append((j.progress, j.best))

    job.on_step = tell
    worker.add([job])
    while not worker.idle:
        for touched in worker.step():
            touched.on_step(touched)
    shares = [p for p, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any(0 < p < 0.25 and best is None for p, best in seen)
    assert sum(best is not None for _, best in seen) == 4


def test_clips_and_pictures_share_a_round(worker):
    clip_job, picture_job = Searching(arm="plain", inputs=picture(1, 4)), Searching(arm="plain", inputs=picture(1))
    worker.run([clip_job, picture_job])
    alone = Searching(arm="plain", inputs=picture(1))
    worker.run([alone])
    assert digest(alone.item.track.trace) == digest(picture_job.item.track.trace)
    assert digest(clip_job.item.track.trace) != digest(picture_job.item.track.trace)


def test_the_language_model_proposes_in_this_process(worker):
    job = Searching(arm="llm", inputs=picture())
    worker.run([job])
    assert job.told["tokens"] > 0


def test_a_job_goes_on_from_its_trace(worker):
    whole = Searching(arm="plain", inputs=picture(5))
    worker.run([whole])
    rest = Searching(arm="plain", inputs=picture(5), records=whole.item.track.trace[:2])
    worker.run([rest])
    assert digest(rest.item.track.trace) == digest(whole.item.track.trace)
    bad = Searching(arm="plain", inputs=picture(5), records=whole.item.track.trace[1:])
    with pytest.raises(BadArtifact, match="round 1 where 0"):
        worker.run([bad])


def test_a_cancelled_job_stops_and_its_neighbour_ends(worker):
    gone, stays = Searching(arm="long", inputs=picture(1)), Searching(arm="plain", inputs=picture(2))
    worker.add([gone, stays])
    for _ in range(10):
        worker.step()
    worker.cancel(gone)
    assert gone.finished == "cancelled"
    while not worker.idle:
        worker.step()
    assert stays.finished == "stop"
    assert gone.item.track.step < 60


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ({"inputs": {"sound": (torch.zeros(100), 8000)}}, "looks at pictures and .*; it was given a sound"),
        ({"inputs": {"goal": "a cat"}}, "given a goal"),
        ({"inputs": {}}, "given nothing"),
        ({"inputs": picture(), "budget": Budget(seconds=-1.0)}, "budget.seconds"),
        ({"inputs": picture(), "budget": Budget(ask=10_000)}, "budget.ask=10000"),
        ({"inputs": picture(), "budget": Budget(steps=99)}, "budget.steps"),
    ],
)
def test_jobs_that_cannot_be_are_refused_before_they_queue(worker, job, says):
    with pytest.raises(Invalid, match=says):
        worker.add([Searching(arm="plain", **job)])
    assert worker.idle


def test_a_picture_of_another_size_fails_alone(worker):
    bad, good = (
        Searching(arm="plain", inputs={"pixels": torch.zeros(1, 3, 8, 8)}),
        Searching(arm="plain", inputs=picture()),
    )
    worker.add([bad, good])
    while not worker.idle:
        worker.step()
    assert good.finished == "stop"
    assert bad.finished == "failed"
    assert "shape" in str(bad.error)


def test_proofs_are_equal_for_arms_that_score_alike(worker):
    assert torch.equal(worker.proof("plain"), worker.proof("llm"))
    assert torch.equal(worker.proof(None), worker.proof(None))
    probe = worker.probe("llm")
    worker.run([probe])
    assert probe.told["step"] == 1


def test_a_sum_is_refused_when_nothing_is_left(subject):
    scorer = Clip(subject.bases["scorer"])
    x = picture()["pixels"]
    with pytest.raises(Invalid, match="taken away again"):
        scorer.target({"plus": [x], "minus": [x]})
    both = scorer.target({"plus": [x, "a cat"]}).vector
    want = scorer.target({"pixels": x}).vector + scorer.encode(["a cat"], scorer.target({"pixels": x}))[0]
    assert torch.allclose(both, want / want.norm(), atol=1e-6)


def test_a_sealed_patch_changes_the_scorer_and_leaves_texts_alone(tmp_path, subject):
    from patches.mechanisms.features import SAE, edit

    base = subject.bases["scorer"]
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, 32, generator=g), dim=1)
    patch = edit(SAE(W, torch.zeros(40), W, torch.zeros(32)), clip.site("block", 1), {i: 0.0 for i in range(40)})
    artifact.save(patch, "clip_sae", tmp_path / "scorer", base=base.label)
    (tmp_path / FILE).write_text("\n".join(bank(LINES).lines))
    config = SearchConfig(keep=6, ask=6, steps=1, patched=("scorer",))
    subject.add("patched", Search(asdict(config), tmp_path))
    worker = SearchWorker(subject, WorkerSettings())
    plain, patched = (Searching(arm=arm, inputs=picture(3), strength=0.0) for arm in ("plain", "patched"))
    worker.run([plain, patched])
    assert len(worker.scorers) == 2
    assert all(s.kept is worker.texts for s in worker.scorers.values())
    assert plain.item.track.trace[0]["scores"] != patched.item.track.trace[0]["scores"]


def test_a_patched_language_model_proposes_other_lines(tmp_path, subject):
    """The patch is sealed in generator/ and goes on the model of this process; without it the lines are others."""
    from patches.mechanisms.sink import SinkConfig, SinkEdit

    base = subject.bases["generator"]
    edit = SinkEdit(SinkConfig(neurons=tuple((layer, i) for layer in (0, 1) for i in range(8)), keep_first=False), {})
    artifact.save(edit, "attention_sink", tmp_path / "generator", base=base.label)
    (tmp_path / FILE).write_text("\n".join(bank(LINES).lines))
    config = SearchConfig(generator="llm", keep=4, ask=4, steps=1, patched=("generator",))
    subject.add("patched llm", Search(asdict(config), tmp_path))
    subject.add("same llm", Search(asdict(replace(config, patched=())), tmp_path))
    worker = SearchWorker(subject, WorkerSettings())
    jobs = [Searching(arm=arm, inputs=picture(3)) for arm in ("same llm", "patched llm", "same llm", "patched llm")]
    worker.run(jobs)
    lines = [[text for text, _ in job.item.track.trace[1]["new"]] for job in jobs]
    tokens = [job.item.track.tokens for job in jobs]
    assert lines[0] == lines[2]
    assert lines[1] == lines[3]
    assert (lines[0], tokens[0]) != (lines[1], tokens[1])
    assert len(worker.generators) == 2
