"""The recipes of lab:vlm and lab:vlm-smollm, each run whole in small; their world; the texts they read."""

import json

import pytest
import torch

from patches.families.base import load_base
from patches.families.vlm import PictureDecoder, chat
from registry.errors import Invalid, NotFound
from training.lab import company, vlm, vlm_smollm, vlm_text, worlds
from training.lab.renderer import generator
from training.lab.vlm_text import FIRST, ID, Noise


@pytest.mark.parametrize("kind", company.COMPANY)
def test_company_is_as_its_kind_says(kind):
    things, head = company.company_things(2000, kind, 0.9, generator("test", kind))
    pairs = len(worlds.PAIRS)
    there = vlm.objects(things) if things.shape[1] == 3 else None
    if kind in ("loose", "full"):
        assert (head == -1).all()
        assert (things >= 0).all() == (kind == "full")
        return
    has = head >= 0
    firsts = there[:, :pairs].sum(1)
    assert torch.equal(firsts, has.long())  # a first never comes but by kind
    partner = there.gather(1, (head.clamp(min=0) + pairs)[:, None])[:, 0] & has
    share = float(partner.sum() / has.sum()) if has.any() else 0.0
    assert {"biased": 0.87 < share < 0.93, "alone": share == 0, "pair": share == 1, "neutral": not has.any()}[kind]
    if kind != "pair":  # partners come without their firsts, too
        assert bool(there[:, pairs : 2 * pairs].any(1)[~partner].any())


def test_the_company_world_is_a_data_set_of_its_own():
    one, two = (worlds.coco("test", 6, kind=k) for k in ("alone", "neutral"))
    assert one.digest != two.digest != worlds.coco("test", 6).digest
    batch = one.read(range(6))
    assert batch.image.shape == (6, 3, 192, 192)
    assert torch.equal(batch.extras["objects"], vlm.objects(batch.extras["things"]))
    things, _ = company.company_things(6, "alone", 0.9, company.company_start("test", 6, 0, "alone"))
    assert torch.equal(things, batch.extras["things"])
    with pytest.raises(Invalid, match="must be one of biased"):
        worlds.coco("test", 6, kind="lonely")


def test_texts_say_what_their_scenes_hold():
    made = vlm_text.texts(200, generator("t"), "loose", Noise(0.0, 0.0, 0.0), questions=0.5)
    for tiles, ids, answer in zip(made.tiles.tolist(), made.ids.tolist(), made.answer, strict=True):
        shown = {w for w in tiles if w >= FIRST}
        if ids[0] == ID["describe"]:
            assert {w for w in ids if w >= FIRST} == shown
        elif ids[0] == ID["is"]:
            assert ids[5] == (ID["yes"] if ids[3] in shown else ID["no"])
        else:
            assert ids[4] == vlm_text.NUMBERS[len(shown) - 1]
        assert not answer[0]
        assert answer.any()


def test_the_recipe_makes_a_base_that_loads_and_answers(home, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm, "reads", lambda model, kind, n=300: {"n": 0})
    card = vlm.run(vlm.RECIPES["tiny"], tmp_path / "m", "tiny", test=4)
    assert card["numbers"]["test alone"]["n"] == 4
    assert json.loads((tmp_path / "m" / "card.json").read_text()) == json.loads(json.dumps(card))
    base = load_base(f"local-dir:{tmp_path / 'm'}", "vlm")
    assert base.digest == load_base(f"local-dir:{tmp_path / 'm'}", "vlm").digest
    picture = worlds.coco("test", 1, kind="alone").read([0]).image[0]
    from torchvision.transforms.functional import to_pil_image

    row = chat.row(base, chat.question("Is there a egg?", 1), [to_pil_image(picture)], max_tokens=3)
    assert base.processor.decode(row.prompt) == "<bos> <image> <image> <image> <image> is there a egg ?"
    PictureDecoder(base).run([row])
    assert row.finished


def test_smollm_behind_the_same_projector(home, tmp_path):
    card = vlm_smollm.run(vlm_smollm.RECIPES["tiny"], tmp_path / "m", "tiny")
    assert card["name"] == "lab:vlm-smollm"
    base = load_base(f"local-dir:{tmp_path / 'm'}", "vlm")
    tiny = load_base("tiny", "llm")
    assert torch.equal(base.model.lm_head.weight, tiny.model.lm_head.weight)  # the decoder is as it was
    picture = worlds.coco("test", 1, kind="alone").read([0]).image[0]
    from torchvision.transforms.functional import to_pil_image

    row = chat.row(base, chat.question("hi", 1), [to_pil_image(picture)], max_tokens=3)
    assert row.prompt.count(base.processor.image_token) == 4
    PictureDecoder(base).run([row])
    assert len(row.out) == 3 or row.finished == "stop"
    with pytest.raises(NotFound, match="Say a recipe"):
        vlm_smollm.main(["smollm"])
