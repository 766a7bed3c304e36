"""What is measured on features made once is what pictures say; the automatic mode of many pictures is that of one."""

import dataclasses

import pytest
import torch

from patches.families.vlm import PictureDecoder, base, chat
from patches.mechanisms import erase
from patches.mechanisms.erase import EraseAsk, EraseEdit
from patches.subject import Subject
from tests.patches.families.vlm.models import MODELS, write
from tests.patches.families.vlm.test_layouts import pictures
from training.vlm_erasure import data, measure
from training.vlm_erasure.chair import area, chair


def scenes(n, objects="abcdefgh"):
    shown = pictures(n)  # of n sizes
    there = torch.zeros(n, len(objects), dtype=torch.bool)
    there[:, 0] = True
    return data.Scenes("made", f"made-{n}", tuple(objects), there, torch.full((n,), -1), lambda i: shown[i])


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_features_say_what_rows_of_pictures_say(name, home, tmp_path):
    vlm = base.load(f"local-dir:{write(name, tmp_path / 'm')}")
    shown = scenes(3)
    seen = data.see(vlm, shown, "hi", 5)
    subject = Subject(vlm, {})
    got = measure.captions(subject, seen)
    want = [chat.row(vlm, chat.question("hi", 1), [shown.picture(i)], max_tokens=5) for i in range(3)]
    PictureDecoder(vlm).run(want)
    assert [r.out for r in got.rows] == [r.out for r in want]
    other = data.ask(vlm, "is there a b?", seen)
    asked = [seen.row(i, seen.asked(other, i, vlm.processor.image_token), max_tokens=3) for i in range(3)]
    whole = [chat.row(vlm, chat.question("is there a b?", 1), [shown.picture(i)], max_tokens=3) for i in range(3)]
    if name != "instructblip":  # its queries read the question, too
        PictureDecoder(vlm).run(asked)
        PictureDecoder(vlm).run(whole)
        assert [r.out for r in asked] == [r.out for r in whole]
    field = measure.lens_field(subject, seen)
    assert field.shape[:2] == (3, base.depth(vlm) + 1)
    states = measure.last_states(subject, seen, got)
    assert {(i, c) for i, c in states} <= {(i, c) for i, c in got.mask.nonzero().tolist()}
    subject.close()


def test_the_automatic_mode_of_many_pictures_is_that_of_one(home):
    vlm = base.tiny()
    shown = scenes(3)
    seen = data.see(vlm, shown, "hi", 8)
    subject = Subject(vlm, {})
    said = measure.captions(subject, seen)
    objects = tuple(dict.fromkeys(w for t in said.texts for w in erase._words(t)))[:12]
    shown = dataclasses.replace(shown, objects=objects, there=torch.ones(3, len(objects), dtype=torch.bool))
    seen = dataclasses.replace(seen, scenes=shown)
    said = measure.captions(subject, seen)
    assert said.mask.any()
    patch = erase.make(vlm, (0, 1), weight=2.0, objects=objects, limit=0.5, rounds=3)
    sure = measure.lens_field(subject, seen).float().amax(2)[:, 0]
    new, erased = measure.automatic(subject, seen, said.mask, sure, 0.5, patch, 3)
    subject.close()
    subject = Subject(vlm, {"a": patch})
    worker = PictureDecoder(vlm, subject.applied)
    for i in range(3):
        job = chat.row(vlm, chat.question("hi", 1), [shown.picture(i)], arm="a", max_tokens=8)
        patch.prepare(job, EraseAsk(erase="auto"), vlm, worker.run)
        assert {e["object"] for e in job.told["erased"]} == {objects[c] for c in erased[i].nonzero()[:, 0].tolist()}
        worker.run([job])
        text = vlm.processor.decode(job.out, skip_special_tokens=True)
        assert set(erase.mentioned(text, objects)) == {objects[c] for c in new[i].nonzero()[:, 0].tolist()}
    subject.close()


class Scripted(EraseEdit):
    """Believes what `believed` holds, and hears captions from a script."""

    believed = ("hat",)

    def _sure(self, base, seen, words):
        return [float(w in self.believed) for w in words]

    def directions(self, base, words, how=None):
        return torch.zeros(len(words), 1, 4)


@pytest.mark.parametrize(
    ("captions", "erased"),
    [
        (["a hat", ""], []),  # all is believed
        (["a hat and a cat", "a hat"], ["cat"]),
        (["a hat and a cat", "a hat and a dog", "a hat and a cow", "a hat and a pig"], ["cat"]),  # never better
        (["a cat and a hat", "a dog and a cow", "a hat"], ["cat", "dog", "cow"]),
        (["a cat", "a dog and a cow", "a dog and a cow and a pig", "a pig and a cow"], []),  # worse than the base
    ],
)
def test_of_several_captions_the_one_with_the_fewest_doubts_stands(captions, erased):
    objects = ("hat", "cat", "dog", "cow", "pig")
    tiny = base.tiny()
    patch = Scripted(erase.make(tiny, (0,), objects=objects, limit=0.5, rounds=3).config, {})
    job = chat.row(tiny, chat.question("hi", 1), pictures(1), arm="a")
    left = iter(captions)

    def run(jobs):
        for one in jobs:
            one.out = [ord(c) - 32 for c in next(left)]
            one.seen = torch.zeros(1, 16, 32)

    decode = lambda ids, **_: "".join(chr(i + 32) for i in ids)  # noqa: E731
    fake = dataclasses.replace(tiny, processor=Decodes(decode))
    patch.prepare(job, EraseAsk(erase="auto"), fake, run)
    assert [e["object"] for e in job.told["erased"]] == erased
    assert job.told["base"] == captions[0]


class Decodes:
    """A processor that only decodes, and knows every word as one token."""

    def __init__(self, decode):
        self.decode = decode

    def word(self, text):
        return [1]


def test_where_nothing_was_said_nothing_is_found():
    none = torch.zeros(4, 3, dtype=torch.bool)
    assert chair(none, ~none)["chair_i"].n == 0
    assert area(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).n == 0
    assert not measure.probe({}, none, {}, (4, 3)).any()
