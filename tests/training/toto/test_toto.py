"""toto: tokens, training that learns a planted rule, the power law, tracking's measures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patches.families.base import load_base
from patches.families.video.tokens import PICTURES, RESERVED, VIDEO
from patches.families.video.track import finer
from patches.families.video.untrained import CODES, FRAMES, IMAGE, PATCH, TOTO
from patches.subject import Subject
from registry.errors import ConfigError, NotFound
from tests.patches.families.video.test_decode import film
from tests.training.data.test_video import ucf
from training.tasks.tracking import boundary, region, score, tracked
from training.toto import RECIPES, evaluate, fit, learn, report
from training.toto.config import Config
from training.toto.fit import made
from training.toto.scaling import law
from training.toto.sizes import SIZES


def test_the_papers_sizes_have_the_papers_counts() -> None:
    """120M, 280M and 1.1B with an embedding of 8,196 (tied but for the largest)."""
    for name, published in (("base", 120e6), ("large", 280e6), ("1b", 1.1e9)):
        s = SIZES[name]
        embeddings = 8196 * s.width * (1 if s.tied else 2)
        assert (s.body + embeddings) / published == pytest.approx(1, abs=0.06), name


def test_body_counts_are_those_of_the_model() -> None:
    codebook = learn.Codebook(torch.zeros(12, 48), 4, 2, True)
    model = learn.new(SIZES["w24"], codebook, 4, 16)
    body = sum(p.numel() for k, p in model.lm.named_parameters() if "embed_tokens" not in k and "lm_head" not in k)
    assert body == SIZES["w24"].body


def test_pictures_are_packed_behind_their_own_mark() -> None:
    video = learn.pool(12, 4, 16)
    codebook = learn.tokenizer(video, 12, points=500)
    clips = learn.tokenise(video, codebook)
    stills = learn.tokenise_pictures(video, codebook, 4, torch.Generator().manual_seed(0))
    assert clips.shape == (12, 18)
    assert stills.shape == (3, 18)
    assert int(clips[0, 0]) == VIDEO
    assert int(stills[0, 0]) == PICTURES
    assert int(clips[:, 1:-1].min()) >= RESERVED


def test_a_rule_is_learnt() -> None:
    """Every token is the one before plus one: the loss falls from log 12 to nearly nothing after the first."""
    codebook = learn.Codebook(torch.zeros(12, 48), 4, 2, True)
    model = learn.new(SIZES["tiny"], codebook, 4, 16)
    start = torch.randint(12, (64, 1), generator=torch.Generator().manual_seed(0))
    ids = torch.nn.functional.pad((start + torch.arange(16)) % 12 + RESERVED, (1, 1), value=2)
    ids[:, 0] = VIDEO
    log = learn.fit(model, ids, ids[:0], learn.Plan(steps=120, batch=16, peak=1e-2), ids[:20])
    assert log["nll_by_frame"][-1] < 0.3
    assert log["nll_by_frame"][0] > log["nll_by_frame"][-1] + 0.2
    assert log["flops"] == 6 * log["body"] * log["tokens"]


def test_a_power_law_is_found() -> None:
    points = [{"flops": 10.0**k, "nll": 7.0 * 10 ** (-0.04 * k)} for k in range(9, 14)]
    got = law(points)
    assert got["exponent"] == pytest.approx(0.04, abs=1e-3)
    assert got["r2"] == pytest.approx(1, abs=1e-3)
    assert got["low"] <= 0.0401
    assert law(points[:3]) == {}
    bent = [dict(p, nll=p["nll"] * (1 + 0.05 * math.sin(i))) for i, p in enumerate(points)]
    assert law(bent)["high"] - law(bent)["low"] > 0.001


def test_j_and_f_of_known_masks() -> None:
    a = torch.zeros(32, 32, dtype=torch.bool)
    a[8:16, 8:16] = True
    assert region(a, a) == 1
    assert boundary(a, a) == 1
    half = a.clone()
    half[8:16, 12:16] = False
    assert region(a, half) == pytest.approx(0.5)
    assert 0 < boundary(a, half) < 1
    assert region(a, ~a) == 0
    empty = torch.zeros_like(a)
    assert boundary(empty, empty) == 1
    assert boundary(a, empty) == 0


def test_copying_a_mask_is_right_where_nothing_moves() -> None:
    mask = torch.zeros(4, 32, 32, dtype=torch.int64)
    mask[:, 4:12, 4:12] = 1
    assert score(mask[:1].expand_as(mask), mask) == (1.0, 1.0)
    moved = mask.clone()
    moved[1:] = torch.roll(mask[1:], (16, 16), (1, 2))
    assert score(mask[:1].expand_as(mask), moved)[0] == 0.0


def test_a_bright_thing_is_followed_at_finer_places() -> None:
    """A white square goes two pixels a frame over noise: its own pixels find it, and leaving the mask does not."""
    model = load_base("tiny:toto", "video").model
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 60, (1, 3, 16, 16), generator=g).repeat(4, 1, 1, 1)
    mask = torch.zeros(4, 16, 16, dtype=torch.uint8)
    for t in range(4):
        video[t, :, 4:10, 2 + 2 * t : 8 + 2 * t] = 250
        mask[t, 4:10, 2 + 2 * t : 8 + 2 * t] = 1
    got = tracked(model, [(video.to(torch.uint8), mask)] * 2, [0, 2])
    assert got["pixels"].value > got["copy"].value + 0.1
    assert got["layer 2 - copy"].value == pytest.approx(got["layer 2"].value - got["copy"].value, abs=1e-5)
    assert got["copy"].n == 2
    (x,) = finer(model, video.to(torch.uint8), [1])
    assert x.shape == (4, 16, 16)  # four frames, 4 x 4 places of 4 px, width 16


def test_a_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="1b"):
        made(Config(size="7b"))


def davis(folder: Path, frames: int = 6) -> Path:
    """A DAVIS of one clip: a square that moves a pixel a frame."""
    for t in range(frames):
        picture = np.full((24, 40, 3), 60, np.uint8)
        picture[6:16, 12 + t : 22 + t] = (200, 40, 40)
        objects = np.zeros((24, 40), np.uint8)
        objects[6:16, 12 + t : 22 + t] = 1
        for place, array, suffix in (("JPEGImages", picture, "jpg"), ("Annotations", objects, "png")):
            file = folder / place / "480p" / "square" / f"{t:05d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("square\n")
    return folder


def test_real_clips_are_trained_on_and_davis_is_tracked(tmp_path: Path, home) -> None:
    pytest.importorskip("av")
    data = ucf(tmp_path / "ucf", film(8, 32, container="avi"), ("still", "left", "right"))
    config = replace(RECIPES["tiny"], base="tiny:toto", data=f"ucf101:{data}", davis=str(davis(tmp_path / "davis")),
                     stride=1, steps=2, labels=6, probe_steps=2, val_clips=3, test_clips=3, codes=8)  # fmt: skip
    fit(config, tmp_path / "out")
    got = evaluate(Subject(load_base("tiny:toto", "video")), config, None)
    assert got["target/track"].n == 1
    assert got["target/probe"].n == 3
    found = report(tmp_path / "out", config)
    assert set(found["tracking"]) >= {"copy", "layer 0", "layer 2", "layer 2 - copy"}
    assert "target/track" not in evaluate(Subject(load_base("tiny:toto", "video")), replace(config, davis=""), None)
    with pytest.raises(ConfigError, match="knows 11 classes, the clips have 3"):
        fit(replace(config, base="tiny:toto-motions"), tmp_path / "no")


def test_published_sizes_are_compared_with_themselves_untrained() -> None:
    for name in ("base", "large", "1b", "paper"):
        config = RECIPES[name]
        assert config.base == f"untrained:toto-{config.size}"
        assert (config.frames, config.image, config.patch * config.shrink) == (FRAMES, IMAGE, PATCH)
        assert config.codes == CODES
    assert SIZES["1b"] is TOTO["1b"]
    with pytest.raises(NotFound, match="untrained:videomae-base, untrained:toto-base"):
        load_base("untrained:toto-7b", "video")


def test_more_seeds_are_no_more_sizes() -> None:
    points = [{"flops": 10.0**k, "nll": 7.0 * 10 ** (-0.04 * k) * (1 + 0.01 * s), "seed": s}
              for k in range(9, 13) for s in range(3)]  # fmt: skip
    got = law(points)
    assert got["sizes"] == 4
    assert got["by_seed"] == pytest.approx([0.04] * 3, abs=1e-4)
