"""A job that makes a forward fail ends alone, whatever it does to fail and whichever worker runs it."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from patches.engine.edits import Act
from patches.engine.isolate import isolate
from patches.engine.patch import Patch, apply
from patches.families import clip
from patches.families.clip.worker import Embedder, Picture
from patches.families.llm.worker import Decoder, Row
from patches.families.worker import Fleet
from registry.errors import Failed, Invalid, NoMemory

# ---- isolate itself ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    size: int = 1
    arm: str | None = None
    finished: Any = None
    error: Any = None


def raising(bad, log, error=RuntimeError):
    def forward(jobs):
        log.append(len(jobs))
        if any(j in bad for j in jobs):
            raise error("this one")
        for j in jobs:
            j.finished = "stop"

    return forward


@pytest.mark.parametrize("where", [[0], [7], [3, 4], [0, 15], list(range(16)), []])
def test_those_that_raise_fail_and_no_other(where):
    jobs, log = [Job() for _ in range(16)], []
    bad = [jobs[i] for i in where]
    isolate(jobs, raising(bad, log), lambda j: j.size)
    assert [j.finished for j in jobs] == ["failed" if j in bad else "stop" for j in jobs]
    assert all(isinstance(j.error, Failed) for j in bad)
    if len(where) == 1:
        assert len(log) == 1 + 2 * 4  # the batch, and both halves of each of log2(16) levels


def test_out_of_memory_gives_up_the_largest(caplog):
    jobs = [Job(size=s) for s in (3, 9, 1, 50, 2)]

    def forward(some):
        if sum(j.size for j in some) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for j in some:
            j.finished = "stop"

    isolate(jobs, forward, lambda j: j.size)
    assert [j.finished for j in jobs] == ["stop", "stop", "stop", "failed", "stop"]
    assert isinstance(jobs[3].error, NoMemory)
    assert jobs[3].error.status == 503


def test_memory_of_the_cpu_counts_too():
    jobs = [Job(size=1), Job(size=2)]
    error = lambda _: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")  # noqa: E731
    isolate(jobs, raising(jobs[1:], [], error), lambda j: j.size)
    assert [j.finished for j in jobs] == ["stop", "failed"]
    assert isinstance(jobs[1].error, NoMemory)


def test_an_error_of_ours_is_kept_as_it_is():
    jobs = [Job(), Job()]
    isolate(jobs, raising(jobs[:1], [], Invalid), lambda j: j.size)
    assert str(jobs[0].error) == "this one"
    assert jobs[1].finished == "stop"


# ---- patches that break: planted, for any family -------------------------------------------------------------------


@dataclass(frozen=True)
class Breaks(Patch):
    """Gives NaN, or raises, at one site."""

    Config = dict

    def edits(self):
        def act(x, inputs):
            if self.config["how"] == "raise":
                raise RuntimeError("planted")
            return torch.full_like(x, {"nan": float("nan"), "inf": float("inf")}[self.config["how"]])

        return [Act(self.config["site"], act)]


def text(arm=None, start=5, n=12):
    return Row([start, 6, 7], arm=arm, max_tokens=n, ignore_eos=True)


@pytest.mark.parametrize("how", ["nan", "inf", "raise"])
def test_an_arm_that_breaks_leaves_the_decoders_other_rows_as_if_alone(tiny_llm, how):
    want = [Decoder(tiny_llm).run([text(start=s)])[0].out for s in range(5, 10)]
    bad = Breaks({"how": how, "site": "model.layers.1.mlp"}, {})
    with apply(tiny_llm.model, {"bad": bad}, root=tiny_llm.root) as on:
        decoder = Decoder(tiny_llm, on, slots=4)  # later rows take the slots that broken ones left
        good = [text(start=s) for s in range(5, 10)]
        rows = [good[0], text("bad"), good[1], text("bad", n=3), good[2], text("bad"), good[3], good[4]]
        decoder.add(rows)
        while not decoder.idle:
            decoder.step()
    assert [r.out for r in good] == want
    assert all(r.finished == "failed" and isinstance(r.error, Failed) and not r.out for r in rows if r.arm)
    assert not any("bad" in str(r.error) for r in rows if r.arm)  # not every caller may know the arm


def test_a_row_that_breaks_on_its_way_fails_then_and_alone(tiny_llm):
    """The sibling: not at the first token, but in the middle of a running batch."""
    want = [r.out for r in Decoder(tiny_llm).run([text(start=s, n=20) for s in (5, 8)])]
    decoder = Decoder(tiny_llm)
    rows = [text(start=5, n=20), text(start=6, n=20), text(start=8, n=20)]
    decoder.add(rows)
    for _ in range(6):
        decoder.step()
    slot = decoder.running.index(rows[1])
    with torch.inference_mode():
        decoder.cache.values[2][slot] = float("nan")  # as a patch that overflows late would leave it
    late = text(start=9, n=20)
    decoder.add([late])
    while not decoder.idle:
        decoder.step()
    assert rows[1].finished == "failed"
    assert len(rows[1].out) == 6
    assert [rows[0].out, rows[2].out] == want
    assert late.out == Decoder(tiny_llm).run([text(start=9, n=20)])[0].out


def test_a_forward_that_fails_once_costs_nobody_a_token(tiny_llm, monkeypatch):
    """What a failed forward leaves behind: lengths have not advanced, so the same step runs again."""
    want = [r.out for r in Decoder(tiny_llm).run([text(start=s) for s in range(5, 9)])]
    decoder, rows, calls = Decoder(tiny_llm), [text(start=s) for s in range(5, 9)], []
    forward = decoder.decoder.layers[2].forward

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 4, 9):
            raise RuntimeError("now and then")
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder.decoder.layers[2], "forward", sometimes)
    decoder.run(rows)
    assert [r.out for r in rows] == want


def test_memory_that_runs_out_while_the_cache_grows_leaves_it_whole(tiny_llm, monkeypatch):
    want = Decoder(tiny_llm).run([text(start=5, n=5)])[0].out
    decoder, rows, calls = Decoder(tiny_llm), [text(start=5, n=5), Row([8] * 300, max_tokens=4)], []
    zeros = torch.zeros

    def full(*size, **how):
        calls.append(size)
        if len(size) == 4 and size[2] > 256 and len(calls) % 3 == 0:
            raise torch.OutOfMemoryError("no room")
        return zeros(*size, **how)

    monkeypatch.setattr("patches.families.llm.worker.torch.zeros", full)
    decoder.add(rows)
    while not decoder.idle:
        decoder.step()
    assert rows[0].out == want
    assert isinstance(rows[1].error, NoMemory)
    monkeypatch.undo()
    again = Row([8] * 300, max_tokens=4, ignore_eos=True)
    decoder.run([again])
    assert again.out == Decoder(tiny_llm).run([Row([8] * 300, max_tokens=4, ignore_eos=True)])[0].out


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-8, 1e-5, 0.0])
def test_the_coldest_temperatures_take_the_most_likely_token(tiny_llm, temperature):
    rows = [Row([5, 6, 7], max_tokens=8, ignore_eos=True, temperature=temperature, top_p=p) for p in (1.0, 1e-300)]
    want = Decoder(tiny_llm).run([text(n=8)])[0].out
    Decoder(tiny_llm).run([*rows, text()])
    assert [r.out for r in rows] == [want, want]


def test_a_draw_that_cannot_be_made_fails_its_row_alone(tiny_llm):
    decoder = Decoder(tiny_llm)
    rows = [text(), Row([5, 6], temperature=float("nan")), Row([5, 6], bias={3: float("inf")}), text()]
    decoder.add(rows)
    while not decoder.idle:
        decoder.step()
    assert [r.finished for r in rows] == ["length", "failed", "failed", "length"]
    assert "temperature nan" in str(rows[1].error)
    assert rows[0].out == rows[3].out


@pytest.mark.parametrize("row", [Row([5, 97]), Row([-1, 5]), Row([5], bias={200: 1.0})], ids=["high", "low", "bias"])
def test_a_token_without_a_row_is_refused_where_it_enters(tiny_llm, row):
    decoder = Decoder(tiny_llm)
    with pytest.raises(Invalid, match="beyond the vocabulary of 97"):
        decoder.add([text(), row])
    assert decoder.idle


def test_nobody_takes_a_failure_for_an_answer(tiny_llm, tiny_clip):
    """`run` is what evaluations and MLflow use: it raises."""
    with apply(tiny_llm.model, {"bad": Breaks({"how": "nan", "site": "model.layers.1.mlp"}, {})}, root="model") as on:
        with pytest.raises(Failed, match="not finite"):
            Decoder(tiny_llm, on).run([text(), text("bad")])
        with pytest.raises(Failed, match="not finite"):
            Decoder(tiny_llm, on).proof("bad")


@pytest.mark.parametrize("how", ["nan", "inf", "raise"])
def test_an_arm_that_breaks_leaves_the_embedders_other_pictures_as_if_alone(tiny_clip, how):
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = clip.embed_images(tiny_clip, x)
    bad = Breaks({"how": how, "site": clip.site("block", 1)}, {})
    with apply(tiny_clip.model, {"bad": bad}, root=tiny_clip.root) as on:
        worker = Embedder(tiny_clip, on, slots=8)
        good, ill = [Picture(v) for v in x], [Picture(x[0], arm="bad"), Picture(x[1], arm="bad")]
        worker.add([good[0], ill[0], *good[1:4], ill[1], *good[4:]])
        while not worker.idle:
            worker.step()
        for p, y in zip(good, want, strict=True):
            torch.testing.assert_close(p.out, y, atol=1e-5, rtol=0)
        assert all(p.finished == "failed" and isinstance(p.error, Failed) and p.out is None for p in ill)
        if how != "raise":
            with pytest.raises(Failed, match="features"):
                worker.proof("bad")
        with pytest.raises(Failed):
            worker.run([Picture(x[0]), Picture(x[1], arm="bad")])


def test_a_step_that_raises_as_a_whole_keeps_what_waits_and_what_other_workers_run(tiny_llm, monkeypatch):
    """Whatever a worker gets wrong itself: its running jobs fail, its waiting ones and other models' do not."""
    base, other = Decoder(tiny_llm, slots=2), Decoder(tiny_llm)
    fleet = Fleet(base)
    fleet.models = {"m": other}
    rows = [text(n=3) for _ in range(4)]
    mine = text(n=3)
    mine.arm = "m"
    fleet.add([*rows, mine])
    leave, calls = base._leave, []

    def once(slot):
        calls.append(slot)
        if len(calls) == 1:
            raise KeyError("bookkeeping")
        leave(slot)

    monkeypatch.setattr(base, "_leave", once)
    while not fleet.idle:
        fleet.advance()
    ends = [r.finished for r in rows]
    assert ends[2:] == ["length", "length"]  # waited, and were kept
    assert set(ends[:2]) <= {"failed", "length"}
    assert all(isinstance(r.error, Failed) for r in rows if r.finished == "failed")
    assert mine.finished == "length"
