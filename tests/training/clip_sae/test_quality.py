"""How good a dictionary is."""

from __future__ import annotations

import pytest
import torch

from patches.mechanisms.features import SAE
from tests.training.clip_sae.planted import D, planted
from training.clip_sae.quality import BINS, Quality, principal_variance


def test_quality_knows_an_exact_copy_and_a_mean_predictor():
    x = planted()[0](0)[:900].view(100, 9, D)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    copy = SAE(both, torch.zeros(2 * D), both, torch.zeros(D))
    quality = Quality(copy)
    for part in x.split(30):
        quality.add(part)
    result = quality.result()
    assert abs(result["all"]["explained_variance"] - 1) < 1e-6
    assert result["all"]["l0_mean"] == D
    assert result["cls"]["tokens"] == 100
    assert result["patches"]["tokens"] == 800
    assert len(result["l0_map"]) == 9
    flat = x.reshape(-1, D)
    for name, part in (("all", flat), ("cls", x[:, 0]), ("patches", x[:, 1:].reshape(-1, D))):
        mean = SAE(torch.zeros(1, D), torch.zeros(1), torch.eye(D)[:1], part.mean(0))
        quality = Quality(mean)
        quality.add(x)
        assert abs(quality.result()[name]["explained_variance"]) < 1e-5
    assert principal_variance(flat, D) == pytest.approx(1.0)
    assert 0.3 < principal_variance(flat, 12) < 0.95


def test_densities_count_features_by_how_often_they_fire():
    x = torch.zeros(1000, 1, 4)
    x[:, 0, 0], x[:10, 0, 1], x[0, 0, 2] = 1.0, 1.0, 1.0  # always, 1 %, 0.1 %, never
    quality = Quality(SAE(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4)))
    quality.add(x)
    part = quality.result()["all"]
    assert part["alive"] == 0.75
    assert dict(zip(BINS, part["density"], strict=False)) | {} == {b: int(b in (-3.0, -2.0, -0.5)) for b in BINS[:-1]}
