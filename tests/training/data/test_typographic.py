import pytest
import torch

from registry.errors import Invalid
from training.data.images import Batch, Dataset
from training.data.typographic import HANDS, OTHERS, written
from training.lab import renderer


def plain(n=12, size=64, classes=("ant", "bee", "rhinoceros beetle")):
    """Grey pictures."""

    def read(rows):
        return Batch(torch.full((len(rows), 3, size, size), 128, dtype=torch.uint8), rows % len(classes), {})

    return Dataset("plain", "train", classes, n, {}, read)


def test_another_class_is_written_and_told():
    data = written(plain())
    batch = data.read(range(12))
    assert (batch.extras["word_label"] != batch.label).all()
    assert batch.extras["word"] == tuple(data.classes[i] for i in batch.extras["word_label"].tolist())
    assert ((batch.image != 128).flatten(1).any(1)).all()


def test_the_strip_is_where_the_word_is():
    """blank is the same strip without letters: it differs from the word's picture inside the strip alone."""
    word, blank = (written(plain(), w).read(range(12)).image for w in ("wrong", "blank"))
    strip = (blank != 128).any(1)
    differs = (word != blank).any(1)
    assert differs.flatten(1).any(1).all()
    assert not (differs & ~strip).any()
    assert torch.equal(written(plain(), "blank").read(range(12)).extras["strip"], strip)
    assert not written(plain(), "none").read(range(12)).extras["strip"].any()


def test_pictures_do_not_depend_on_how_they_are_read():
    whole = written(plain(), seed=3).read(range(12))
    for i in (0, 5, 11):
        assert torch.equal(written(plain(), seed=3).read([i]).image[0], whole.image[i])
    assert not torch.equal(written(plain(), seed=4).read(range(12)).image, whole.image)


def test_nothing_written_is_the_picture_itself():
    batch = written(plain(), "none").read(range(3))
    assert (batch.image == 128).all()
    assert (batch.extras["word_label"] == -1).all()
    own = written(plain(), "own").read(range(12))
    assert torch.equal(own.extras["word_label"], own.label)


def test_the_digest_tells_what_is_written():
    assert len({written(plain(), w, s).digest for w in ("none", "blank", "wrong") for s in (0, 1)}) == 6


def test_what_cannot_be_written_is_refused():
    with pytest.raises(Invalid, match="must be none"):
        written(plain(), "upside down")
    with pytest.raises(Invalid, match="one class"):
        written(plain(classes=("ant",)))


@pytest.mark.parametrize("hand", [h for h in HANDS if h != "strip"])
def test_a_hand_writes_its_own_way_where_it_says(hand):
    plainly, word, blank = (
        written(plain(size=96), w, 2, h).read(range(12))
        for w, h in (("wrong", "strip"), ("wrong", hand), ("blank", hand))
    )
    assert (word.image != plainly.image).any()
    assert torch.equal(word.extras["word_label"], plainly.extras["word_label"])  # the attack is the same
    bare, strip = not HANDS[hand].paper, word.extras["strip"]
    assert (blank.image == 128).all().item() == bare  # without paper the control is the picture itself
    assert ((word.image != blank.image).any(1)).flatten(1).any(1).all()
    far = (
        torch.nn.functional.max_pool2d(strip[:, None].float(), 5, 1, 2)[:, 0] == 0
    )  # slanted letters lean out a little
    assert not ((word.image != 128).any(1) & far).any()


def test_no_lab_model_is_fitted_in_the_fonts_of_other_hands():
    assert not {*renderer.FONTS.values()} & {*OTHERS}
    with pytest.raises(Invalid, match="bare"):
        written(plain(), hand="bear")
