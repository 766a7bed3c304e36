"""toto: tokens, training that learns a planted rule, the power law, tracking's measures."""

from __future__ import annotations

import math

import pytest
import torch

from patches.families.video.tokens import PICTURES, RESERVED, VIDEO
from registry.errors import ConfigError
from training.tasks.tracking import boundary, copied, each, region
from training.toto import learn
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
    mask = torch.zeros(2, 4, 32, 32, dtype=torch.uint8)
    mask[:, :, 4:12, 4:12] = 1
    assert copied(mask)["JF"] == 1
    mask[1, 1:, 4:12, 4:12] = 0
    mask[1, 1:, 20:28, 20:28] = 1
    assert [j for j, _ in each(mask[:, :1].expand_as(mask), mask)] == [1.0, 0.0]


def test_a_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="1b"):
        made(Config(size="7b"))
