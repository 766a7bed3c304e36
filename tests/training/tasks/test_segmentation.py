"""Scores of maps against masks at their extremes, and the table on a tiny base."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from patches.families import clip
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from training.lab import worlds
from training.tasks.segmentation import average_precision, order, scores, table, ways


def test_a_perfect_map_scores_one_and_its_opposite_nothing():
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 8:24, 8:24] = True
    got = scores(mask.float()[:, ::4, ::4], mask, "half")
    assert got["iou"].min() > 0.9
    assert order(mask.float()[:, ::4, ::4], mask)["precision"].min() > 0.95
    wrong = scores(-mask.float()[:, ::4, ::4], mask, "half")
    assert wrong["iou"].max() < 0.05


def test_what_is_asked_for_by_name_is_the_label_and_not_the_prediction(tiny_clip):
    classes = worlds.coco_classes()
    data = worlds.coco("test", 5)
    batch = data.read(range(5))
    x = tiny_clip.processor.image(batch.image)
    weights = clip.zero_shot(tiny_clip, classes)
    made = ways(Lens(tiny_clip), weights)["direct effects"](x, batch.label)
    apart = weights - weights.mean(1, keepdim=True)
    one = maps.grid(Lens(tiny_clip), x[3:4], apart[:, batch.label[3:4]].T)[0, 0]
    torch.testing.assert_close(made[3], one)
    got = table(tiny_clip, data, classes, named=True)["direct effects"]
    want = {**scores(made, batch.extras["mask"]), **order(made, batch.extras["mask"])}
    for key, (value, _, n) in got.items():
        assert n == 5
        assert value == pytest.approx(float(want[key].mean()), abs=1e-3)


def test_a_map_points_at_its_highest_place():
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, :8, :8] = True
    x = torch.zeros(2, 4, 4)
    x[0, 0, 0] = x[1, 3, 3] = 1.0
    assert order(x, mask)["pointing"].tolist() == [1.0, 0.0]


def test_average_precision_is_the_share_for_a_flat_order():
    right = torch.tensor([True, False, True, False])
    assert average_precision(torch.tensor([4.0, 3.0, 2.0, 1.0]), right) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.tensor([4.0, 1.0, 3.0, 0.0]), right) == 1.0


def test_runs_and_thresholds_say_the_same_mask():
    x = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    for threshold in ("mean", "half", "otsu"):
        mask = maps.mask(x, threshold, 24)
        flat, value = [], False
        for n in maps.runs(mask)["counts"]:
            flat += [value] * n
            value = not value
        assert torch.tensor(flat).view(24, 24).equal(mask)
    two = torch.zeros(4, 4)
    two[:2] = 1.0
    assert maps.mask(two, "otsu", 4).equal(two.bool())
    assert not maps.mask(torch.zeros(4, 4), "half", 8).any()


def test_what_is_drawn_is_the_mask_of_what_speaks_for_the_text_outlined():
    """Half of a map of two lobes speaks against: by its mean over all it would be part of the mask."""
    x = -torch.ones(6, 6)
    x[1:3, 1:3] = 4.0
    x[:, 5] = -9.0
    got = maps.drawn(torch.full((3, 12, 12), 0.5), x, "mean", 24, ["floats", "rle", "png"])
    want = maps.mask(x.clamp_min(0), "mean", 24)
    assert got["rle"] == maps.runs(want)
    assert got["covered"] == pytest.approx(float(want.float().mean()))
    assert got["covered"] < 0.5 * float(maps.mask(x, "mean", 24).float().mean())
    assert got["floats"] == x.tolist()
    line = maps.outline(want)
    shown = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(got["png"].split(",")[1]))))).permute(
        2, 0, 1
    )
    assert bool((shown[:, line] == 255).all())
    assert 0 < int(line.sum()) < int(want.sum())
    assert not bool((line & ~want).any())


def test_a_map_is_red_for_blue_against_and_grey_where_it_says_nothing():
    x = torch.zeros(3, 3)
    x[0, 0], x[2, 2] = 2.0, -1.0
    red, green, blue = maps.overlay(torch.full((3, 9, 9), 0.5), x, 9).int()
    assert red[0, 0] > 180 > 80 > blue[0, 0]
    assert blue[8, 8] > red[8, 8]
    assert red[4, 4] == green[4, 4] == blue[4, 4] == 128
    assert red[0, 0] - blue[0, 0] > blue[8, 8] - red[8, 8]  # one scale for both


def test_the_table_has_every_way_with_its_n(tiny_clip):
    got = table(tiny_clip, worlds.imagenet("test", 6), worlds.imagenet_classes()[:5])
    assert {"direct effects", "raw attention, last layer", "nothing is found"} <= got.keys()
    assert all(row["iou"][2] == 6 and 0 <= row["iou"][0] <= 1 for row in got.values())
