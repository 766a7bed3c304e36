"""Recorded activations: their need is told before it is taken, and bfloat16 and files say what memory says."""

import logging

import pytest
import torch

from registry.errors import ConfigError, NotReady
from training.clip_sae import room
from training.clip_sae.config import RECIPES
from training.clip_sae.streams import streams
from training.tasks.recognition import pictures


@pytest.fixture
def recorded(tiny_clip, monkeypatch):
    config = RECIPES["tiny"]
    data = pictures(config, "train", 40)["clean"]

    def record(**settings):
        for name in ("PATCHBAY_STREAM", "PATCHBAY_STREAM_FOLDER"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        return streams(tiny_clip, config, data)[1]

    return record


def test_half_precision_and_files_say_what_memory_says(recorded, tmp_path):
    want = recorded()
    assert want.x.dtype == torch.float32
    for settings, atol in (({"PATCHBAY_STREAM": "bf16"}, 2e-2), ({"PATCHBAY_STREAM_FOLDER": tmp_path}, 0.0),
                           ({"PATCHBAY_STREAM": "bf16", "PATCHBAY_STREAM_FOLDER": tmp_path}, 2e-2)):  # fmt: skip
        got = recorded(**settings)
        assert got.x.dtype == (torch.bfloat16 if atol else torch.float32)
        assert not list(tmp_path.iterdir())  # gone from the folder, and from the disk with the process
        scale = want.x.abs().max()
        for a, b in zip(got.parts(16), want.parts(16), strict=True):
            assert a.x.dtype == torch.float32
            torch.testing.assert_close(a.x, b.x, atol=float(scale) * atol, rtol=0)
            assert torch.equal(a.label, b.label)
        torch.testing.assert_close(got.mean(), want.mean(), atol=float(scale) * atol + 1e-6, rtol=0)
        assert got.size() == pytest.approx(want.size(), rel=1e-2)
        some = torch.tensor([3, 1, 30])
        torch.testing.assert_close(got.rows(some).x.float(), want.x[some], atol=float(scale) * atol, rtol=0)


def test_the_need_is_told_before_it_is_taken(recorded, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "patchbay"):
        recorded()
    assert "40 pictures x 17 tokens x 32 at 1 sites need 0.0 GiB of memory" in caplog.text
    taken = []
    monkeypatch.setattr(room, "taken", lambda *a: taken.append(a))
    free = type("Free", (), {"available": 50_000})
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: free)
    with pytest.raises(NotReady, match="PATCHBAY_STREAM=bf16, or in files: PATCHBAY_STREAM_FOLDER"):
        recorded()
    assert not taken
    with pytest.raises(ConfigError, match="'int4' is none of fp32, bf16"):
        recorded(PATCHBAY_STREAM="int4")


def test_the_papers_counts_on_vit_l_are_refused_with_their_need(monkeypatch):
    free = type("Free", (), {"available": 64 << 30})
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        NotReady, match=r"14,000 pictures x 257 tokens x 1024 at 24 sites need 329\.4 GiB.*64\.0 GiB free"
    ):
        room.check(24, (14_000, 257, 1024), torch.device("cpu"))
