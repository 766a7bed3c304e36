"""The lab world: the same seed gives the same bytes, what it says of a picture is true, and splits share nothing."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from registry.errors import Invalid, NotFound, NotReady, Tampered
from training.lab import atlas, clip, renderer, worlds
from training.lab.renderer import GROUNDS, Layout, generator, grounds, render, things, writing

LAB = atlas.load()
WORLDS = sorted(worlds.WORLDS)


def scenes(n=12, k=1, seed=0, words=True):
    g = generator("test", seed)
    pool = LAB.pick(range(len(LAB.names)), worlds.SEEN)
    shape = (n, k) if k > 1 else (n,)
    text = writing(["cat", "hot dog", "a"] * (n // 3), g) if words else None
    return Layout(grounds(n, g), things(renderer.choose(pool, shape, g), g), text)


def without(layout):
    """The grounds alone."""
    nothing = torch.full_like(layout.things.sprite, -1)
    return Layout(layout.grounds, replace(layout.things, sprite=nothing))


def near(mask):
    """(B, R, R) bool, grown by three pixels: soft edges, and strokes too thin to cover half a pixel."""
    return torch.nn.functional.max_pool2d(mask.float(), 7, 1, 3) > 0


# ---- the atlas ---------------------------------------------------------------------------------------------------


def test_the_atlas_has_every_style_and_a_place_for_every_sprite():
    assert len(LAB.names) == 1198
    assert LAB.styles == atlas.STYLES
    assert len(set(LAB.names)) == len(LAB.names)
    rows, styles = torch.where(LAB.table >= 0)
    assert torch.equal(LAB.concept[LAB.table[rows, styles]], rows)
    assert torch.equal(LAB.style[LAB.table[rows, styles]], styles)
    assert len(rows) + int((LAB.tone > 0).sum()) == len(LAB.sprites)


def test_no_sprite_is_empty():
    assert int(LAB.sprites[:, 3].flatten(1).max(1).values.min()) > 200


def test_all_binaries_of_the_atlas_stay_small():
    assert sum(f.stat().st_size for f in atlas.FOLDER.iterdir()) < 9 * 2**20


def test_every_sheet_has_an_author_and_a_licence_beside_it():
    index = json.loads((atlas.FOLDER / atlas.INDEX).read_text())
    said = (atlas.FOLDER / "ATTRIBUTION.md").read_text()
    for style in index["styles"]:
        row = next(line for line in said.splitlines() if f"`{style['sheet']}`" in line)
        assert style["author"] in row
        assert style["licence"] in row
        assert style["package"] in row
    assert {f.name for f in atlas.FOLDER.glob("LICENSE*")} == {"LICENSE-Apache-2.0.txt", "LICENSE-MIT.txt"}


def test_a_changed_sheet_and_a_missing_atlas_are_refused(tmp_path):
    with pytest.raises(NotFound, match="no sprite atlas"):
        atlas.load(tmp_path)
    shutil.copytree(atlas.FOLDER, tmp_path / "a")
    sheet = tmp_path / "a" / "openmoji.webp"
    raw = bytearray(sheet.read_bytes())
    raw[-100] ^= 1
    sheet.write_bytes(raw)
    with pytest.raises(Tampered, match=r"openmoji\.webp"):
        atlas.load(tmp_path / "a")


def test_an_unknown_concept_is_answered_with_near_ones():
    with pytest.raises(NotFound, match="ear of corn"):
        LAB.find("corn")
    assert LAB.names[LAB.find("hot dog")] == "hot dog"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("man blond hair", ("man", "blond", False, "", "")),
        ("woman beard", ("woman", "", True, "", "")),
        ("man bald", ("man", "bald", False, "", "")),
        ("old woman", ("woman", "", False, "old", "")),
        ("older person", ("", "", False, "old", "")),
        ("girl", ("woman", "", False, "child", "")),
        ("woman firefighter", ("woman", "", False, "", "firefighter")),
        ("man", ("man", "", False, "", "")),
    ],
)
def test_names_tell_the_attributes_of_people(name, want):
    who = atlas.person(name)
    assert (who.gender, who.hair, who.beard, who.age, who.does) == want


def test_things_are_nobody():
    assert atlas.person("hamburger") is None
    assert atlas.person("mango") is None
    assert atlas.person("old key") is None


def packages(folder, styles=atlas.STYLES):
    """A node_modules with a red apple and a blond man in each style, and a flag that must not come in."""
    base = folder / "emojibase-data"
    (base / "en").mkdir(parents=True)
    (base / "package.json").write_text('{"version": "0.0.1"}')
    keys = {"groups": ["food-drink", "people-body", "flags"], "subgroups": ["food-fruit", "person", "flag"]}
    messages = {k: [{"order": i, "key": v} for i, v in enumerate(vs)] for k, vs in keys.items()}
    (base / "en" / "messages.json").write_text(json.dumps(messages))
    labels = ["red apple", "man: blond hair", "flag: Peru"]
    data = [{"label": label, "group": i, "subgroup": i} for i, label in enumerate(labels)]
    (base / "en" / "data.json").write_text(json.dumps(data))
    square = '<rect x="{x}" width="8" height="16" fill="{fill}"/>'
    for style in styles:
        at = folder / "@iconify-json" / style
        at.mkdir(parents=True)
        fluent = style.startswith("fluent")
        toned = "man-blonde-hair-dark" if fluent else "man-dark-skin-tone-blond-hair"
        icons = {
            "red-apple": {"body": square.format(x=0, fill="#f00")},
            "man-blonde-hair" if fluent else "man-blond-hair": {"body": square.format(x=8, fill="#ff0")},
            toned: {"body": square.format(x=8, fill="#00f")},
            "flag-peru": {"body": square.format(x=0, fill="#f00")},
        }
        (at / "icons.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
        (at / "package.json").write_text('{"version": "1.2.3"}')
        about = {"author": {"name": "A", "url": "u"}, "license": {"spdx": "MIT", "url": "l"}}
        (at / "info.json").write_text(json.dumps(about))


def test_the_atlas_is_built_from_icon_packages(tmp_path):
    pytest.importorskip("resvg_py")
    packages(tmp_path / "node_modules")
    atlas.build(tmp_path / "node_modules", tmp_path / "atlas")
    lab = atlas.load(tmp_path / "atlas")
    assert lab.names == ("man blond hair", "red apple")
    assert lab.subgroups == ("person", "food-fruit")
    assert len(lab.sprites) == 3 * len(atlas.STYLES)
    apple = lab.sprites[lab.table[1, 0]]
    assert apple[:, 32, 10].tolist() == [255, 0, 0, 255]
    assert apple[:, 32, 50].tolist() == [0, 0, 0, 0]
    dark = lab.sprites[(lab.concept == 0) & (lab.tone == atlas.TONES.index("dark"))]
    assert len(dark) == len(atlas.STYLES)
    assert dark[:, :, 32, 50].tolist() == [[0, 0, 255, 255]] * len(dark)


def test_building_says_what_is_missing(tmp_path):
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        with pytest.raises(NotReady, match="pip install resvg-py"):
            atlas.build(tmp_path, tmp_path / "out")
    else:
        with pytest.raises(NotFound, match=r"messages\.json"):
            atlas.build(tmp_path, tmp_path / "out")


# ---- the renderer ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads_or_the_batch():
    layout = scenes(36, k=3)
    first = render(layout)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = render(scenes(36, k=3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    rows = torch.tensor([35, 3, 7])
    some = render(renderer.take(layout, rows))
    assert torch.equal(some.image, first.image[rows])
    assert torch.equal(some.box, first.box[rows])
    assert some.words == tuple(first.words[i] for i in rows)
    assert not torch.equal(render(scenes(36, k=3, seed=1)).image, first.image)


def test_a_mask_is_where_the_thing_changed_the_ground():
    layout = scenes(24, words=False)
    layout = replace(layout, grounds=replace(layout.grounds, kind=torch.full((24,), GROUNDS.index("blue sky"))))
    drawn, bare = render(layout), render(without(layout))
    changed = (drawn.image.int() - bare.image.int()).abs().amax(1) > 0
    mask = drawn.mask[:, 0]
    assert (mask & changed).sum() > 0.97 * mask.sum()  # a thing may have the ground's colour here and there
    faint = (changed & ~near(mask)).float().mean()  # glows and shadows, less than half opaque
    assert float(faint) < 0.02
    assert mask.flatten(1).any(1).all()


def test_boxes_are_tight_around_what_is_whole():
    drawn = render(scenes(24, words=False))
    for (x0, y0, x1, y1), mask in zip(drawn.box[:, 0].tolist(), drawn.mask[:, 0], strict=True):
        ys, xs = torch.where(mask)
        assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_a_square_lands_where_the_layout_puts_it(monkeypatch):
    square = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    square[:, [0, 3], 16:48, 16:48] = 255
    planted = replace(LAB, sprites=square, concept=torch.tensor([7]), style=torch.tensor([2]))
    monkeypatch.setattr(renderer, "_atlas", lambda device: planted)
    g = generator("square")
    layout = Layout(grounds(2, g), things(torch.zeros(2, dtype=torch.int64), g, turn=0, tint=0))
    layout = replace(
        layout,
        things=replace(
            layout.things,
            centre=torch.tensor([[[0.5, -0.5]], [[0.0, 0.25]]]),
            size=torch.tensor([[0.5], [1.0]]),
        ),
    )
    drawn = render(layout)
    assert drawn.box[:, 0].tolist() == [[60, 12, 84, 36], [24, 36, 72, 84]]
    assert drawn.mask.flatten(1).sum(1).tolist() == [24 * 24, 48 * 48]
    assert drawn.concept.tolist() == [[7], [7]]
    assert drawn.style.tolist() == [[2], [2]]
    assert drawn.image[1, :, 60, 48].tolist() == [255, 0, 0]
    turned = replace(layout, things=replace(layout.things, turn=torch.full((2, 1), torch.pi / 4)))
    wider = render(turned).box[1, 0]
    assert abs(int(wider[2] - wider[0]) - 48 * 2**0.5) <= 2
    half = render(layout, size=48)
    assert half.box[:, 0].tolist() == [[30, 6, 42, 18], [12, 18, 36, 42]]


def test_mirroring_and_turning_follow_the_layout(monkeypatch):
    left = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    left[:, [0, 3], 24:40, 0:16] = 255
    planted = replace(LAB, sprites=left, concept=torch.tensor([0]), style=torch.tensor([0]))
    monkeypatch.setattr(renderer, "_atlas", lambda device: planted)
    g = generator("left")
    layout = Layout(grounds(3, g), things(torch.zeros(3, dtype=torch.int64), g, size=(0.6, 0.6), centred=True, turn=0))
    layout = replace(
        layout,
        things=replace(
            layout.things,
            mirror=torch.tensor([[False], [True], [False]]),
            turn=torch.tensor([[0.0], [0.0], [torch.pi / 2]]),
        ),
    )
    box = render(layout).box[:, 0].float()
    x, y = (box[:, 0] + box[:, 2]) / 2 - 48, (box[:, 1] + box[:, 3]) / 2 - 48
    assert x[0] < -15
    assert x[1] > 15
    assert y[2].abs() > 15
    assert x[2].abs() < 2


def test_what_is_in_front_covers_what_is_behind():
    layout = scenes(24, k=2, words=False)
    middle = torch.zeros_like(layout.things.centre)
    layout = replace(layout, things=replace(layout.things, centre=middle))
    drawn = render(layout)
    front = render(
        replace(layout, things=replace(layout.things, sprite=layout.things.sprite[:, 1:], **_one(layout, 1)))
    )
    back = render(replace(layout, things=replace(layout.things, sprite=layout.things.sprite[:, :1], **_one(layout, 0))))
    assert torch.equal(drawn.mask[:, 1], front.mask[:, 0])
    assert torch.equal(drawn.mask[:, 0], back.mask[:, 0] & ~front.mask[:, 0])
    assert torch.equal(drawn.box[:, 0], back.box[:, 0])  # of the whole thing, covered or not


def _one(layout, i):
    t = layout.things
    return {k: getattr(t, k)[:, i : i + 1] for k in ("centre", "size", "turn", "mirror", "tint")}


def test_letters_and_strip_are_where_writing_changed_the_picture():
    layout = scenes(24)
    clean, blank = (
        render(replace(layout, writing=None)),
        render(replace(layout, writing=replace(layout.writing, blank=True))),
    )
    drawn = render(layout)
    inked = (drawn.image.int() - blank.image.int()).abs().amax(1) > 60
    papered = (drawn.image.int() - clean.image.int()).abs().amax(1) > 0
    assert int((inked & drawn.letters).sum()) > 0.8 * int(drawn.letters.sum())
    assert not bool((inked & ~near(drawn.letters)).any())
    assert not bool((papered & ~near(drawn.strip)).any())
    for (x0, y0, x1, y1), letters in zip(drawn.word_box.tolist(), drawn.letters, strict=True):
        outside = letters.clone()
        outside[y0:y1, x0:x1] = False
        assert letters.any()
        assert not outside.any()
    assert not (drawn.mask[:, 0] & drawn.strip).any()
    assert blank.words == ("",) * 24
    assert not blank.letters.any()


def test_every_word_fits_on_its_strip():
    for font in range(len(renderer.FONTS)):
        for word in ("cat", "caterpillar", "a", "jigsaw", "Wwwwwwwwwww"):
            ink = renderer._letters(word, font)
            assert ink.max() > 0.9
            assert max(ink[0].max(), ink[-1].max(), ink[:, 0].max(), ink[:, -1].max()) == 0


def test_captions_name_things_ground_and_word():
    g = generator("caption")
    ids = torch.tensor([[LAB.table[LAB.find("cat"), 0], LAB.table[LAB.find("pizza"), 0]]])
    layout = Layout(grounds(torch.tensor([GROUNDS.index("wood")]), g), things(ids, g), writing(["duck"], g))
    assert render(layout).captions == ("a picture of a cat and a pizza on wood with the word duck",)
    bare = Layout(layout.grounds, replace(layout.things, sprite=torch.full((1, 2), -1)))
    assert render(bare).captions == ("a picture of wood",)


def test_an_empty_layout_is_refused():
    with pytest.raises(NotFound, match="no picture"):
        render(renderer.take(scenes(3), slice(0, 0)))


@pytest.mark.gpu
def test_the_gpu_draws_the_same_pictures():
    layout = scenes(60, k=3)
    a, b = render(layout), render(layout, "cuda")
    off = (a.image.int() - b.image.cpu().int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 1e-3
    assert (a.mask != b.mask.cpu()).float().mean() < 1e-4


# ---- the worlds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("split", worlds.SPLITS)
def test_every_world_gives_every_split_and_says_the_truth_of_it(name, split):
    data = worlds.WORLDS[name](split, 24)
    batch = data.read(range(24))
    assert data.name == f"lab:{name}"
    assert len(data) == 24
    assert batch.image.dtype == torch.uint8
    assert batch.image.shape[-3:] == (3, 96, 96)
    assert batch.label.min() >= 0
    assert batch.label.max() < len(data.classes)
    styles = {LAB.styles[i] for i in batch.extras["style"].flatten().tolist()}
    assert (styles == {atlas.HELD}) if split == "held" else atlas.HELD not in styles
    assert all(len(v) == 24 for v in batch.extras.values())


@pytest.mark.parametrize("name", WORLDS)
def test_pictures_depend_on_the_seed_and_not_on_how_they_are_read(name):
    world = worlds.WORLDS[name]
    data = world("val", 22)
    batch, some = data.read(range(22)), data.read([13, 2])
    assert torch.equal(some.image, batch.image[[13, 2]])
    assert torch.equal(some.label, batch.label[[13, 2]])
    assert torch.equal(torch.cat([b.image for b in world("val", 22).batches(5)]), batch.image)
    assert data.digest == world("val", 22).digest
    others = [world("val", 22, seed=1), world("test", 22), world("val", 21)]
    assert len({data.digest, *(o.digest for o in others)}) == 4
    assert not torch.equal(others[0].read(range(22)).image, batch.image)


def test_classes_and_words_of_the_typographic_splits_are_apart():
    train, val, test, held = (set(worlds.typographic_classes(s)) for s in worlds.SPLITS)
    assert not train & val
    assert not train & test
    assert not val & test
    assert held <= test
    assert min(len(train), len(test)) > 90
    assert len(val) > 40
    for split, own in (("train", train), ("val", val), ("test", test)):
        batch = worlds.typographic(split, 100).read(range(100))
        assert set(batch.extras["word"]) <= own
        assert {LAB.names[c] for c in batch.extras["concept"].tolist()} <= own


def test_no_style_and_no_texture_is_in_two_splits():
    for a in ("train", "val", "test", "held"):
        for b in ("train", "val", "test", "held"):
            assert a == b or not set(worlds.STYLES[a]) & set(worlds.STYLES[b])
    assert {s for of in worlds.STYLES.values() for s in of} == set(atlas.STYLES)
    seen = [set(range(*worlds._TEXTURES[s])) for s in ("train", "val", "test")]
    assert sum(map(len, seen)) == len(set().union(*seen)) == renderer.TEXTURES


@pytest.mark.parametrize("fold", worlds.HANDS)
@pytest.mark.parametrize("name", ["waterbirds", "celeba"])
def test_a_fold_leaves_one_hand_out_and_shows_nothing_of_test(name, fold):
    world = worlds.WORLDS[name]
    train, val = (world(split, 60, fold=fold).read(range(60)).extras for split in ("train", "val"))
    drew = [{atlas.STYLES[i] for i in extras["style"].tolist()} for extras in (train, val)]
    assert drew[1] <= set(worlds.HANDS[fold])
    assert drew[0] | drew[1] <= set(worlds.STYLES["train"] + worlds.STYLES["val"])
    assert not drew[0] & set(worlds.HANDS[fold])
    first, second = (set(range(*worlds._drawn(split, fold)[1])) for split in ("train", "val"))
    assert not first & second
    assert not (first | second) & set(range(*worlds._TEXTURES["test"]))
    assert world("val", 4, fold=fold).digest != world("val", 4).digest
    for split, odd in (("test", fold), ("val", "twemoji")):
        with pytest.raises(NotFound, match="folds are noto, fluent-emoji, openmoji, of train and val"):
            world(split, 4, fold=odd)


def test_a_font_is_held_out_of_fitting():
    def fonts(split):
        return {f for seed in range(3) for f in worlds.typographic(split, 40, seed).about["fonts"]}

    assert fonts("train") == fonts("val") == {"sans", "serif", "mono"}
    assert fonts("test") == set(renderer.FONTS)
    only = worlds.typographic("test", 10, fonts=("times",))
    assert only.about["fonts"] == ["times"]


def test_the_four_attacks_differ_only_where_something_is_written():
    kinds = {w: worlds.typographic("test", 40, word=w).read(range(40)) for w in ("none", "blank", "own", "wrong")}
    none, blank, own, wrong = (kinds[k] for k in ("none", "blank", "own", "wrong"))
    strip = near(blank.extras["strip"] | wrong.extras["strip"])[:, None]
    assert torch.equal(none.image * ~strip, blank.image * ~strip)
    for batch in (own, wrong):
        ink = near(batch.extras["letters"])[:, None]
        assert torch.equal(blank.image * ~ink, batch.image * ~ink)
    assert torch.equal(own.extras["word_label"], own.label)
    assert (wrong.extras["word_label"] != wrong.label).all()
    assert (none.extras["word_label"] == -1).all()
    assert (blank.extras["word_label"] == -1).all()
    classes = worlds.typographic_classes("test")
    assert wrong.extras["word"] == tuple(classes[i] for i in wrong.extras["word_label"])
    for y, word in zip(wrong.label.tolist(), wrong.extras["word"], strict=True):
        assert not set(classes[y].split()) & set(word.split())


def test_waterbirds_are_on_water_as_often_as_stated():
    train = worlds.waterbirds("train", 400).read(range(400))
    label, place = train.label, train.extras["place"]
    for y in (0, 1):
        assert int((label == y).sum()) == 200
        assert int((place[label == y] == y).sum()) == 190
    assert torch.equal(train.extras["ground"] == GROUNDS.index("water"), place == 1)
    kinds = [{LAB.find(b) for b in of} for of in (worlds.LANDBIRDS, worlds.WATERBIRDS)]
    assert all(c in kinds[y] for c, y in zip(train.extras["concept"].tolist(), label.tolist(), strict=True))
    for split in ("val", "test", "held"):
        batch = worlds.waterbirds(split, 80).read(range(80))
        assert torch.bincount(batch.extras["group"], minlength=4).tolist() == [20] * 4


def test_the_blond_are_women_as_often_as_stated_and_attributes_are_those_of_the_name():
    train = worlds.celeba("train", 400).read(range(400))
    label, male = train.label, train.extras["place"]
    assert int(male[label == 1].sum()) == 12
    assert int(male[label == 0].sum()) == 100
    for c, has in zip(train.extras["concept"].tolist(), train.extras["attributes"].tolist(), strict=True):
        said, who = dict(zip(worlds.ATTRIBUTES, has, strict=True)), atlas.person(LAB.names[c])
        assert said["male"] == (who.gender == "man")
        assert said["beard"] == who.beard
        assert said["old"] == (who.age == "old")
        assert [h for h in ("blond", "red", "white", "curly", "bald") if said[h]] == ([who.hair] if who.hair else [])
    assert torch.equal(train.extras["attributes"][:, 1].long(), label)
    assert len(set(train.extras["tone"].tolist())) == len(atlas.TONES)
    for split in ("val", "test", "held"):
        batch = worlds.celeba(split, 80).read(range(80))
        assert torch.bincount(batch.extras["group"], minlength=4).tolist() == [20] * 4


def test_other_attributes_can_be_target_and_spurious():
    batch = worlds.celeba("val", 40, target="male", spurious="old").read(range(40))
    assert torch.equal(batch.extras["attributes"][:, 0].long(), batch.label)
    assert torch.equal(batch.extras["attributes"][:, 7].long(), batch.extras["place"])
    with pytest.raises(NotFound, match="Attributes"):
        worlds.celeba("val", target="handsome")


def test_partners_come_together_as_often_as_stated():
    train = worlds.coco("train", 240).read(range(240))
    assert int(train.extras["partner"].sum()) == 216
    classes = [LAB.find(c) for c in worlds.coco_classes()]
    for row, objects in zip(train.extras["concepts"].tolist(), train.extras["objects"], strict=True):
        assert len(set(row)) == 3
        assert {classes[i] for i in torch.where(objects)[0].tolist()} == set(row)
    pairs = len(worlds.PAIRS)
    with_partner = train.extras["objects"][torch.arange(240), train.label + pairs]
    assert torch.equal(with_partner, train.extras["partner"])
    test = worlds.coco("test", 48).read(range(48))
    assert int(test.extras["partner"].sum()) == 24


def test_things_move_as_the_label_says():
    data = worlds.actions("test", 44, frames=8)
    batch = data.read(range(44))
    assert batch.image.shape == (44, 8, 3, 96, 96)
    box = batch.extras["box"].float()
    x, y = (box[..., 0] + box[..., 2]) / 2, (box[..., 1] + box[..., 3]) / 2
    wide = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    for i, label in enumerate(batch.label.tolist()):
        name = data.classes[label]
        dx, dy, grown = x[i, -1] - x[i, 0], y[i, -1] - y[i, 0], wide[i, -1] / wide[i, 0]
        if name in ("left", "right"):
            assert dx * (1 if name == "right" else -1) > 25
            assert abs(dy) < 6
        elif name in ("up", "down"):
            assert dy * (1 if name == "down" else -1) > 25
            assert abs(dx) < 6
        elif name == "grow":
            assert grown > 1.5
        elif name == "shrink":
            assert grown < 0.7
        elif name == "still":
            assert torch.equal(batch.image[i, 0], batch.image[i, -1])
        elif name == "swing":
            assert x[i].max() - x[i].min() > 20
        elif name == "bounce":
            assert y[i].max() - y[i].min() > 20
    labels = worlds.actions("train", 110).read(range(0, 110, 10)).label
    assert len(set(labels.tolist())) > 3


def test_what_a_world_does_not_have_is_said():
    with pytest.raises(Invalid, match="train, val, test, held"):
        worlds.imagenet("validation")
    with pytest.raises(Invalid, match="n=0"):
        worlds.imagenet("test", 0)
    with pytest.raises(Invalid, match="none, blank, own or wrong"):
        worlds.typographic("test", 10, word="scribble")
    with pytest.raises(NotFound, match="Fonts"):
        worlds.typographic("test", 10, fonts=("papyrus",))
    with pytest.raises(NotFound, match="Nobody drew"):
        worlds.celeba("held", 10, target="curly")
    with pytest.raises(Invalid, match="at least two"):
        worlds.actions("test", 10, frames=1)


# ---- the checkpoint ----------------------------------------------------------------------------------------------


def test_captions_of_training_say_what_is_drawn():
    config = clip.Config(device="cpu", tint=1.0)
    made = clip.pairs(300, config, generator("captions"))
    scene = render(made.layout)
    seen = {clip.KINDS[k] for k in made.kind.tolist()}
    assert seen == set(clip.KINDS)
    for i, (text, kind) in enumerate(zip(made.captions, made.kind.tolist(), strict=True)):
        there = [LAB.names[c] for c in scene.concept[i].tolist() if c >= 0]
        strip, what = made.layout.writing.words[i], clip.KINDS[kind]
        if what in ("one", "many", "own"):
            assert there[0] in text
        if what == "many":
            assert len(there) >= 2
            assert f"and a {there[1]}" in text
        if what == "own":
            assert strip in ("", there[0])
        if what == "text":
            assert not there
            assert strip in text
        if what == "covered":
            assert there[0] in text
            assert not strip or strip == there[0] or strip not in text
        if what == "other":
            assert there[0] in text or strip in text
        if " on " in text and text.split(" on ")[-1] in GROUNDS:
            assert GROUNDS[int(scene.ground[i])] == text.split(" on ")[-1]
    styles = {LAB.styles[s] for s in scene.style.flatten().tolist() if s >= 0}
    assert styles == set(worlds.SEEN)


def test_a_covering_strip_has_no_letters():
    config = clip.Config(device="cpu")
    made = clip.pairs(200, config, generator("covered"))
    rows = torch.tensor(
        [i for i, k in enumerate(made.kind.tolist()) if clip.KINDS[k] == "covered" and made.layout.writing.words[i]]
    )
    assert len(rows) > 3
    layout = renderer.take(made.layout, rows)
    with_, without_ = render(layout), render(replace(layout, writing=replace(layout.writing, blank=True)))
    assert torch.equal(with_.image, without_.image)


def test_the_tokenizer_spells_any_word_and_its_last_id_ends_a_text():
    config = clip.RECIPES["tiny"]
    words = clip.tokenizer(config)
    ids = words("a picture of a cat", padding=False)["input_ids"]
    assert ids[-1] == len(words) - 1
    assert ids[0] == len(words) - 2
    assert words.decode(words("zyxomma")["input_ids"], skip_special_tokens=True).strip() == "zyxomma"
    assert words("CAT")["input_ids"] == words("cat")["input_ids"]


def test_a_tiny_checkpoint_trains_saves_and_loads_as_any_open_clip_folder(tmp_path):
    from patches.families.base import load_base

    card = clip.main(["tiny", str(tmp_path / "clip")])
    base = load_base(f"local-dir:{tmp_path / 'clip'}", "clip")
    assert base.digest == card["digest"]
    assert card["numbers"]["lab/typographic/test/own"] >= 0
    assert json.loads((tmp_path / "clip" / "card.json").read_text()) == card
    again = clip.main(["tiny", str(tmp_path / "again")])
    assert again["digest"] == card["digest"]
    assert again["loss"] == card["loss"]


def test_training_learns_from_the_pictures(tmp_path):
    config = replace(clip.RECIPES["tiny"], steps=60, batch=24, lr=3e-3, concepts=4)
    _, log = clip.train(config, tmp_path)
    assert log["loss"][-1] < log["loss"][0] - 0.3


def test_a_recipe_or_a_device_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="tiny, lab, paper"):
        clip.main(["huge", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotReady, match="Declare cpu"):
        clip.main(["paper", str(tmp_path)])
