"""Caption metrics against values worked out by hand."""

import math

import pytest
import torch

from registry.errors import Invalid
from training.tasks import captions


def test_bleu_of_the_papers_example():
    """Papineni's "the the the": clipped unigram precision 2/7, and a hand-computed BLEU-2."""
    refs = [["the cat is on the mat", "there is a cat on the mat"]]
    assert captions.bleu(["the the the the the the the"], refs, 1) == pytest.approx(2 / 7)
    # "the cat on the mat": 5/5 unigrams, bigrams the-cat, on-the, the-mat and cat-on (2nd reference): 4/4; r = 6, c = 5
    assert captions.bleu(["the cat on the mat"], refs, 2) == pytest.approx(math.exp(1 - 6 / 5))
    # 3-grams: "the cat on" no, "cat on the", "on the mat" yes: 2/3
    want = math.exp(1 - 6 / 5) * (1 * 1 * 2 / 3) ** (1 / 3)
    assert captions.bleu(["the cat on the mat"], refs, 3) == pytest.approx(want)
    assert captions.bleu(["a dog"], refs) == 0.0


def test_bleu_counts_over_the_corpus():
    """Precisions are pooled, not averaged: 1 of 2 and 4 of 4 words are 5 of 6."""
    got = captions.bleu(["red cat", "a b c d"], [["red dog"], ["a b c d"]], 1)
    assert got == pytest.approx(5 / 6)


def test_cider_d_by_hand():
    """Two items with one reference each. idf of a word in one item is log 2, in both 0."""
    refs = [["red cat"], ["red dog"]]
    # item 1, "cat": unigram vector {cat: log 2}, reference {red: 0, cat: log 2}: cosine 1, one word shorter
    got = captions.cider_d(["cat", "red dog"], refs)
    assert got[0] == pytest.approx(10 / 4 * math.exp(-1 / 72))
    # item 2 is its reference: unigrams {dog} 1, bigrams {red dog} 1, longer n-grams there are none
    assert got[1] == pytest.approx(10 / 4 * 2)
    # repeating a word does not pay: min(2 log 2, log 2) * log 2 / (2 log 2 * log 2) = 1/2, one word longer... of two
    got = captions.cider_d(["dog dog", "red dog"], [["blue dog"], ["red cat"]])
    c, r = 2 * math.log(2), math.sqrt(2) * math.log(2)
    assert got[0] == pytest.approx(10 / 4 * math.log(2) * math.log(2) / (c * r))


def test_objects_by_whole_names():
    names = ["horse", "horse face", "red apple", "apple"]
    assert captions.named("A Horse Face, and a red apple.", names) == {"horse face", "red apple"}
    got = captions.objects("a horse and an apple", ["horse", "red apple"], names)
    assert (got.precision, got.recall, got.f1) == (0.5, 0.5, 0.5)
    assert captions.objects("nothing", ["horse"], names).f1 == 0.0


def test_clip_score_is_never_negative():
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), dim=-1)
    y = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    assert captions.clip_score(x, y).tolist() == pytest.approx([1.5, 0.0])


@pytest.mark.parametrize(("said", "refs"), [([], []), (["a"], [[]]), (["a"], [["b"], ["c"]])])
def test_captions_without_references_are_refused(said, refs):
    with pytest.raises(Invalid):
        captions.bleu(said, refs)
