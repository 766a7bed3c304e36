"""COCO's own files, read as the paper's protocol reads them; and what CHAIR, POPE and AUROC count, by hand."""

import json

import pytest
import torch
from PIL import Image

from patches.mechanisms.erase import mentioned
from registry.errors import NotFound
from training.lab.renderer import generator
from training.vlm_erasure import data
from training.vlm_erasure.chair import answers, auroc, chair, pope

SHOWN = {7: {"dog", "bicycle"}, 9: {"pizza"}, 12: set()}


@pytest.fixture
def coco(tmp_path):
    """Three pictures with COCO's own ids, file names and annotation layout; one shows none of the 80 classes."""
    names = {1: "person", 2: "bicycle", 18: "dog", 59: "pizza", 91: "hat"}
    number = {n: i for i, n in names.items()}
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in SHOWN]
    boxes = [{"image_id": i, "category_id": number[n]} for i, shown in SHOWN.items() for n in sorted(shown)]
    boxes.append({"image_id": 12, "category_id": 91})  # a category that is none of the 80
    (tmp_path / "val2014").mkdir()
    for image in images:
        Image.new("RGB", (40, 30), (20 * image["id"], 0, 0)).save(tmp_path / "val2014" / image["file_name"])
    about = {"images": images, "annotations": boxes, "categories": [{"id": i, "name": n} for i, n in names.items()]}
    (tmp_path / "instances.json").write_text(json.dumps(about))
    captions = [{"image_id": 9, "caption": "A woman eats pizza with a fork."}, {"image_id": 404, "caption": "A cat."}]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    return tmp_path


def shown(scenes, row):
    return {n for n, there in zip(scenes.names, scenes.there[row].tolist(), strict=True) if there}


def test_annotations_say_what_is_in_a_picture(coco):
    scenes = data.coco(str(coco / "val2014"), str(coco / "instances.json"))
    assert len(scenes) == 2  # the picture without any of the 80 classes is left out
    got = {scenes.picture(i).getpixel((0, 0))[0]: shown(scenes, i) for i in range(2)}
    assert {round(k / 20): v for k, v in got.items()} == {7: SHOWN[7], 9: SHOWN[9]}
    assert scenes.digest == data.coco(str(coco / "val2014"), str(coco / "instances.json")).digest


def test_objects_of_reference_captions_count_as_there(coco):
    scenes = data.coco(str(coco / "val2014"), str(coco / "instances.json"), str(coco / "captions.json"))
    row = next(i for i in range(len(scenes)) if "pizza" in shown(scenes, i))
    assert shown(scenes, row) == {"pizza", "person", "fork"}


def test_a_missing_file_is_named(coco):
    with pytest.raises(NotFound, match=r"instances_\*\.json"):
        data.coco(str(coco / "val2014"), str(coco / "nothing.json"))


def test_synonyms_and_plurals_are_one_object():
    said = mentioned("Two dogs and a puppy lie on a couch beside wine glasses.", data.COCO_OBJECTS)
    assert {"dog", "couch", "wine glass"} <= set(said)
    assert "chair" not in said


def test_chair_counts_what_is_said_and_not_there():
    there = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    said = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    got = chair(said, there)
    assert got["chair_i"].value == pytest.approx(1 / 3)
    assert got["chair_s"].value == pytest.approx(1 / 2)
    assert got["recall"].value == pytest.approx(2 / 3)
    assert got["precision"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_pope_asks_for_one_thing_that_is_there_and_one_that_is_not(kind):
    there = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    there[:, 0], there[:, 7] = True, False
    asked = pope(there, torch.full((30,), -1), kind, generator("pope", kind))
    assert bool(asked.yes.any())
    assert not bool(asked.yes.all())
    perfect = answers(asked.yes, asked)
    assert perfect["accuracy"].value == 1.0
    assert perfect["false_yes"].value == 0.0
    assert answers(torch.ones_like(asked.yes), asked)["false_yes"].value == 1.0


def test_auroc_counts_ties_half():
    assert auroc(torch.tensor([3.0, 2.0]), torch.tensor([2.0, 1.0])) == pytest.approx(3.5 / 4)
