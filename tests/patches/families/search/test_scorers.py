"""Scorers with a planted truth: what was hidden in the target is what a search finds, for sums, crops, prompts and
styles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from patches.families import clip
from patches.families.search import scorers
from patches.families.search.bank import things
from patches.families.search.generators import Mutation
from patches.families.search.loop import Item, Searcher
from patches.families.search.scorers import Both, Clip, Cropped, Preference, Renderer, Scorer, Style, Target
from registry.errors import Invalid

from .world import BANK, GROUNDS, LINES, NOUNS, Hidden, config


@pytest.fixture(scope="module")
def base():
    return clip.FAMILY.tiny(0)


def pixels(seed=0, frames=1):
    return torch.randn(frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def found(scorer, target, start=(), **how):
    """The best text of a search for a target that is already there."""
    c = config(**how)
    item = Item(inputs={}, config=c, target=target, start=start)
    Searcher(c, BANK, scorer, Mutation(BANK)).run([item])
    return item.track.best


# ---- sums ------------------------------------------------------------------------------------------------------------


def test_what_is_left_of_a_sum_of_words_is_found(base):
    """ "hat and cup on snow" + "dog" - "dog": the one text whose embedding that is wins."""
    scorer, hidden = Clip(base), "a picture of a hat"  # short: the tiny base cuts texts at 24 tokens
    target = scorer.target({"plus": [hidden, "a dog"], "minus": ["a dog"]})
    best = found(scorer, target, steps=2)
    assert best.text == hidden
    assert best.score == pytest.approx(1.0, abs=1e-5)


def test_a_sum_of_a_picture_and_a_word_is_their_sum(base):
    scorer, x = Clip(base), pixels(1)
    whole = scorer.target({"plus": [x], "minus": ["a cat"]}).vector
    parts = scorer.images(x) - scorer.encode(["a cat"], Target(torch.zeros(0)))[0]
    assert torch.allclose(whole, F.normalize(parts, dim=0), atol=1e-6)


def test_a_clip_is_the_mean_of_its_frames(base):
    scorer, x = Clip(base), pixels(2, frames=3)
    mean = torch.stack([scorer.images(f[None]) for f in x]).mean(0)
    assert torch.allclose(scorer.target({"pixels": x}).vector, F.normalize(mean, dim=0), atol=1e-6)


def test_both_is_the_mean_of_two_scorers(base):
    one, other = Clip(base), Clip(clip.FAMILY.tiny(1))
    both = Both(one, other)
    inputs = {"pixels": pixels(3)}
    texts = list(LINES[:5])
    got = both(both.target({"both": (inputs, inputs)}), texts)
    each = zip(one(one.target(inputs), texts), other(other.target(inputs), texts), strict=True)
    want = [(a + b) / 2 for a, b in each]
    assert got == pytest.approx(want, abs=1e-6)
    with pytest.raises(Invalid, match="two inputs"):
        both.target(inputs)


# ---- crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a picture of a cat and a dog on sand", ("a picture of a cat", "a picture of a dog")),
        ("a picture of a cat on sand", ("a picture of a cat",)),
        ("a picture of a cat and a cat", ("a picture of a cat",)),
        ("a red cat with a hat in snow", ("a red cat", "a hat")),
        ("a picture of a pot of food and a nut", ("a picture of a pot of food", "a picture of a nut")),
        ("cat", ("cat",)),
        ("a picture of snow and", ("a picture of snow",)),
    ],
)
def test_a_line_is_cut_into_its_things(line, parts):
    assert things(line) == parts


def test_crops_score_is_the_mean_of_whole_and_best_crops(base):
    scorer, plain = Cropped(base), Clip(base)
    x, text = pixels(4), "a picture of a cat and a dog on sand"
    target = scorer.target({"pixels": x})
    assert target.crops.shape == (9, plain.images(x).shape[0])
    e = {t: plain.encode([t], target)[0] for t in (text, *things(text))}
    best = [float((target.crops @ e[t]).max()) for t in things(text)]
    want = (float(plain.images(x) @ e[text]) + sum(best) / 2) / 2
    assert scorer(target, [text]) == pytest.approx([want], abs=1e-5)
    with pytest.raises(Invalid, match="crops=0"):
        scorer.target({"plus": ["a cat"]})


def test_two_things_in_two_crops_are_found_where_the_whole_shows_one(base):
    """The whole picture looks like its first thing alone; the crops hold both."""
    plain, nothing = Clip(base), Target(torch.zeros(0))
    one, other = plain.encode(["a picture of a cat", "a picture of a fox"], nothing)
    target = Target(F.normalize(one + 0.2 * other, dim=0), crops=torch.stack([one, other]))
    assert found(plain, replace(target, crops=None), steps=2).text == "a picture of a cat"
    cropped, pairs = Cropped(base), [f"a picture of a {a} and a {b}" for a in NOUNS for b in NOUNS if a < b]
    scores = dict(zip(pairs, cropped(replace(target, vector=0 * one), pairs), strict=True))
    assert max(scores, key=scores.get) == "a picture of a cat and a fox"


def test_forgotten_features_are_made_again(base, monkeypatch):
    scorer = Cropped(base)
    target = scorer.target({"pixels": pixels(5)})
    first = scorer(target, LINES)
    monkeypatch.setattr(scorers, "MAX_TEXTS", 48)
    assert scorer(target, [f"a {n}" for n in NOUNS]) is not None
    assert scorer(target, LINES[:20]) == first[:20]


# ---- what draws ------------------------------------------------------------------------------------------------------


class Stripes(Renderer):
    """A stripe for every noun that is said, and a shade for the ground; a picture is covered by the ground's shade."""

    batch = 4

    def __init__(self):
        self.drawn = []

    def draw(self, texts, picture=None):
        self.drawn += texts
        out = []
        for text in texts:
            said = text.split()
            x = torch.zeros(3, 32, 32, dtype=torch.uint8) if picture is None else picture.clone()
            if picture is None:
                for i, n in enumerate(NOUNS):
                    if n in said:
                        x[i % 3, :, 2 * i : 2 * i + 2] = 255
            for k, ground in enumerate(GROUNDS):
                if ground in said:
                    x[:, 24:] = 60 * (k + 1)
            out.append(x)
        return torch.stack(out)


def test_the_prompt_that_draws_the_wanted_picture_is_found(base):
    """Each candidate is drawn once, for all rounds, in the renderer's batches."""
    drawer, hidden = Stripes(), "a picture of a hat and a cup on snow"
    scorer = Preference(base, drawer)
    with pytest.raises(Invalid, match="goal"):
        scorer.target({"goal": " "})
    wanted = scorer.described(drawer.draw([hidden]), Target(torch.zeros(0)))[0]
    drawer.drawn.clear()
    best = found(scorer, Target(wanted), start=("a picture of a cat",), steps=3)
    assert torch.equal(drawer.draw([best.text]), drawer.draw([hidden]))
    assert best.score == pytest.approx(1.0, abs=1e-5)
    assert len(drawer.drawn[:-2]) == len(set(drawer.drawn[:-2]))


def test_the_style_that_a_picture_has_is_found(base):
    drawer = Stripes()
    content = (255 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))).byte()
    scorer = Style(base, drawer)
    style = drawer.draw(["on snow"], content)[0]
    target = scorer.target({"content": content, "style": style})
    scores = dict(zip(GROUNDS, scorer(target, [f"a picture of a cat on {g}" for g in GROUNDS]), strict=True))
    assert max(scores, key=scores.get) == "snow"
    best = found(scorer, target, steps=4)
    assert "snow" in best.text.split()
    with pytest.raises(Invalid, match="two pictures"):
        scorer.target({"style": style})


def test_every_scorer_gives_scores_without_slices_as_with():
    scorer: Scorer = Hidden()
    target = scorer.target({"hidden": "a picture of a cat"})
    slices = list(scorer.filling(target, list(LINES)))
    assert len(slices) == -(-len(LINES) // scorers.BATCH)
    assert scorer(target, LINES) == Hidden()(target, LINES)
