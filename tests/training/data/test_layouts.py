"""Photographed attacks are used by name: `data=rta:/folder` measures on them, and fits on the lab's drawings."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from patches.subject import Subject
from registry.errors import ConfigError, NotFound
from training.clip_sae import RECIPES
from training.data import layouts
from training.tasks import recognition

WORDS = ("cat", "dog", "sun")


@pytest.fixture
def folders(tmp_path):
    """layout -> a folder as the published set lies."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("rta", "paint", "disentangling", "imagenet/val/cat", "imagenet/val/dog", "imagenet/test/cat",
                 "imagenet/test/dog", "scam"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    colours = {"cat": (200, 30, 30), "dog": (30, 200, 30), "sun": (30, 30, 200)}

    def save(at, what):
        Image.new("RGB", (40, 40), colours[what]).save(at)

    about = {}
    rows = []
    for i, (what, word) in enumerate((("cat", "dog"), ("dog", "sun"), ("sun", "cat"))):
        for name in ("rta", "paint"):
            save(tmp_path / name / f"label={what}_text={word}.png", what)
        for kind, said in (("clean", ""), ("word", word)):
            save(tmp_path / "disentangling" / f"{kind}{i}.png", what)
            about[f"{kind}{i}.png"] = {"true object": what, "typographic attack label": said}
        for variant in ("SCAM", "NoSCAM", "SynthSCAM"):
            raw = (tmp_path / "rta" / f"label={what}_text={word}.png").read_bytes()
            rows.append(
                {"image": {"bytes": raw, "path": ""}, "id": f"{variant}_{i}", "object_label": what, "attack_word": word}
            )
    (tmp_path / "disentangling" / "annotations.json").write_text(json.dumps(about))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scam" / "part.parquet")
    for split in ("val", "test"):
        for what in ("cat", "dog"):
            save(tmp_path / "imagenet" / split / what / "0.png", what)
    return tmp_path


@pytest.mark.parametrize(
    ("layout", "sets"),
    [("rta", {"attacked"}), ("paint", {"attacked"}), ("scam", {"clean", "attacked"}),
     ("disentangling", {"clean", "attacked"})],
)  # fmt: skip
def test_eval_measures_on_the_layout_that_data_names(layout, sets, folders, tiny_clip):
    config = replace(RECIPES["tiny"], data=f"{layout}:{folders / layout}", test_images=3)
    found = recognition.pictures(config, "test", 3)
    assert found.keys() == sets
    assert all(len(d) == 3 for d in found.values())
    assert set(found["attacked"].classes) == set(WORDS)
    assert all((b.extras["word_label"] >= 0).all() for b in found["attacked"].batches())
    with Subject(tiny_clip) as subject:
        got = recognition.evaluate(subject, config, None)
    wanted = {"target/attacked", "target/says_word", "target/two_way"} | (
        {"quality/clean"} if "clean" in sets else set()
    )
    assert got.keys() == wanted
    assert all(m.n == 3 and m.low <= m.value <= m.high for m in got.values())
    # what is fitted and chosen on is drawn, so that nothing is learned from a test set
    assert recognition.pictures(config, "train", 2)["clean"].name.startswith("lab:")


def test_fitted_on_one_and_measured_on_another(folders):
    data = f"imagenet:{folders / 'imagenet'},scam:{folders / 'scam'}"
    config = replace(RECIPES["tiny"], data=data)
    assert recognition.pictures(config, "val", 2)["attacked"].name == "imagenet"
    assert recognition.pictures(config, "test", 2)["attacked"].name == "scam"
    plain = replace(RECIPES["tiny"], data=str(folders / "imagenet"))
    assert recognition.pictures(plain, "test", 2)["attacked"].name == "imagenet"


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ("scm:/x", ConfigError, "Layouts: scam"),
        ("rta:/x,scam:/y", ConfigError, "the second of its kind"),
        ("rta:/nowhere", NotFound, "There is no folder /nowhere"),
        ("/nowhere", NotFound, "There is no folder /nowhere"),
    ],
)
def test_what_is_no_layout_is_refused(data, error, says):
    with pytest.raises(error, match=says):
        recognition.pictures(replace(RECIPES["tiny"], data=data), "test", 2)


def test_groups_have_no_photographed_attacks(folders):
    config = replace(RECIPES["tiny"], task="waterbirds", data=f"rta:{folders / 'rta'}")
    with pytest.raises(ConfigError, match="attacks are for task=typographic, not waterbirds"):
        recognition.pictures(config, "test", 2)


def test_names_of_layouts_are_read_as_they_are_written(tmp_path):
    assert layouts.named("") == layouts.Named("")
    assert layouts.named(str(tmp_path)) == layouts.Named(str(tmp_path))
    assert layouts.named("rta:/a b") == layouts.Named("", ("rta", "/a b"))
    assert layouts.named("/x,scam:/y") == layouts.Named("/x", ("scam", "/y"))
