"""Real clips in their true layouts, written small: what is listed is read, what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from registry.errors import BadArtifact, ConfigError, NotFound
from tests.patches.families.video.test_decode import film
from training.data import video as readers
from training.data.video import Sampling

SMALL = Sampling(frames=4, stride=2, size=32)


@pytest.fixture(scope="module")
def clip() -> bytes:
    return film(12, 48, container="avi")


def put(file: Path, raw: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(raw)


def test_ucf101_by_its_lists(tmp_path: Path, clip: bytes) -> None:
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("Biking/v_Biking_g01_c01.avi\nArchery/v_Archery_g01_c01.avi\n")
    for name in ("Archery/v_Archery_g08_c01", "Biking/v_Biking_g01_c01", "Archery/v_Archery_g01_c01"):
        put(tmp_path / "UCF-101" / f"{name}.avi", clip)
    test = readers.ucf101(tmp_path, "test", 1, SMALL)
    assert test.classes == ("Archery", "Biking")
    batch = test.read([0, 1])
    assert tuple(batch.image.shape) == (2, 4, 3, 32, 32)
    assert batch.label.tolist() == [1, 0]
    assert len(readers.ucf101(tmp_path, "train", 1, SMALL)) == 1
    (tmp_path / "UCF-101" / "Biking" / "v_Biking_g01_c01.avi").unlink()
    with pytest.raises(NotFound, match="1 of 2 clips are missing"):
        readers.ucf101(tmp_path, "test", 1, SMALL)


def test_hmdb51_by_its_numbers(tmp_path: Path, clip: bytes) -> None:
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    (lists / "wave_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    (lists / "run_test_split1.txt").write_text("d.avi 2 \n")
    for name in ("wave/a", "wave/b", "wave/c", "run/d"):
        put(tmp_path / f"{name}.avi", clip)
    assert len(readers.hmdb51(tmp_path, "train", 1, SMALL)) == 1
    test = readers.hmdb51(tmp_path, "test", 1, SMALL)
    assert test.classes == ("run", "wave")
    assert test.read([0, 1]).label.tolist() == [0, 1]


def test_kinetics_by_folders_and_by_a_list(tmp_path: Path, clip: bytes) -> None:
    for name in ("val/abseiling/a", "val/zumba/b"):
        put(tmp_path / f"{name}.avi", clip)
    assert readers.kinetics(tmp_path, "val", SMALL).classes == ("abseiling", "zumba")
    (tmp_path / "train.csv").write_text("val/abseiling/a.avi 10\nval/zumba/b.avi 9\n")
    listed = readers.kinetics(tmp_path, "train", SMALL)
    assert listed.classes == ("9", "10")
    assert listed.read([0]).label.tolist() == [1]


def test_ucf101_p_by_corruption(tmp_path: Path, clip: bytes) -> None:
    put(tmp_path / "shot" / "3" / "Biking" / "v.avi", clip)
    assert len(readers.ucf101_p(tmp_path, "shot", 3, SMALL)) == 1
    with pytest.raises(NotFound, match="There are: shot"):
        readers.ucf101_p(tmp_path, "fog", 3, SMALL)


def test_davis_has_frames_and_numbered_objects(tmp_path: Path) -> None:
    for t in range(3):
        frame = tmp_path / "JPEGImages" / "480p" / "bear" / f"{t:05d}.jpg"
        mask = tmp_path / "Annotations" / "480p" / "bear" / f"{t:05d}.png"
        for file in (frame, mask):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 40), (20 * t, 0, 0)).save(frame)
        objects = np.zeros((40, 64), np.uint8)
        objects[5:20, 5:20], objects[22:30, 30:50] = 1, 2
        picture = Image.fromarray(objects).convert("P")
        picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
        picture.save(mask)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    (read,) = readers.davis(tmp_path)
    clip = read()
    assert tuple(clip.video.shape) == (3, 3, 40, 64)
    assert clip.mask.unique().tolist() == [0, 1, 2]
    (small,) = readers.davis(tmp_path, size=20)
    assert tuple(small().mask.shape) == (3, 20, 32)
    assert small().mask.dtype == torch.uint8
    (tmp_path / "Annotations" / "480p" / "bear" / "00001.png").unlink()
    with pytest.raises(BadArtifact, match="3 frames and 2 masks"):
        read()


def ucf(folder: Path, raw: bytes, classes: tuple[str, ...] = ("Archery", "Biking"), train: int = 3) -> Path:
    """A UCF101 of so many training clips a class and one of test."""
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("".join(f"{i + 1} {c}\n" for i, c in enumerate(classes)))
    names = {c: [f"{c}/v_{c}_g{g:02d}_c01.avi" for g in range(train + 1)] for c in classes}
    (lists / "testlist01.txt").write_text("".join(f"{names[c][0]}\n" for c in classes))
    (lists / "trainlist01.txt").write_text("".join(f"{n} 1\n" for c in classes for n in names[c][1:]))
    for name in (n for c in classes for n in names[c]):
        put(folder / "UCF-101" / name, raw)
    return folder


def test_a_recipe_names_a_reader_and_its_folder(tmp_path: Path, clip: bytes) -> None:
    folder = ucf(tmp_path, clip)
    for data in (str(folder), f"ucf101:{folder}"):
        train, val, test = (readers.source(data, s, SMALL) for s in ("train", "val", "test"))
        assert (len(train), len(val), len(test)) == (4, 2, 2)
        assert train.label.tolist() == [0, 0, 1, 1]
    names = {s: set(readers.source(data, s, SMALL).read([0, 1]).extras["file"]) for s in ("train", "val", "test")}
    assert not names["train"] & names["val"]
    assert not names["train"] & names["test"]
    assert readers.source(data, "train", SMALL).digest != readers.source(data, "val", SMALL).digest
    video, label, classes = readers.held(data, "train", 3, SMALL)
    assert tuple(video.shape) == (3, 4, 3, 32, 32)
    assert classes == ("Archery", "Biking")
    assert torch.equal(readers.held(data, "train", 3, SMALL)[1], label)
    with pytest.raises(ConfigError, match="there is no reader 'imagenet'"):
        readers.source(f"imagenet:{folder}", "train")


def test_kinetics_tests_on_its_val(tmp_path: Path, clip: bytes) -> None:
    for name in ("train/abseiling/a", "train/abseiling/b", "val/abseiling/c"):
        put(tmp_path / f"{name}.mp4", clip)
    data = f"kinetics:{tmp_path}"
    assert [len(readers.source(data, s, SMALL)) for s in ("train", "val", "test")] == [1, 1, 1]


def test_real_clips_that_are_short_are_seen_whole_and_wait_at_their_last_frame(tmp_path: Path) -> None:
    data = str(ucf(tmp_path, film(12, 48, container="avi")))
    seen = readers.source(data, "test", Sampling(6, 4, 32)).read([0]).image[0]  # 6 frames at stride 4 need 21
    assert float((seen[0].float() - seen[-1].float()).abs().mean()) > 1
    waits = readers.source(data, "test", Sampling(16, 4, 32)).read([0]).image[0]
    assert torch.equal(waits[11], waits[15])
    assert not torch.equal(waits[0], waits[11])
