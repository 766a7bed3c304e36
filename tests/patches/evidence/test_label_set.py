"""A probe that travels with a patch: the same back, and nothing that does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from patches.evidence.label_set import FILE, LabelSet, load_label_set, save_label_set
from registry.errors import BadArtifact, NotFound


def test_what_is_sealed_comes_back(tmp_path):
    weights = torch.randn(6, 2)
    save_label_set(LabelSet(("land bird", "Wasservogel ü"), weights), tmp_path)
    one = load_label_set(tmp_path)
    assert one.labels == ("land bird", "Wasservogel ü")
    assert torch.equal(one.weights, weights)


def test_an_artifact_without_one_says_what_to_do(tmp_path):
    with pytest.raises(NotFound, match="name the labels"):
        load_label_set(tmp_path)


def test_columns_of_one_label_are_one_class_whose_probabilities_add_up():
    g = torch.Generator().manual_seed(0)
    weights, y = torch.randn(6, 5, generator=g), torch.randn(4, 6, generator=g)
    one = LabelSet(("land", "water", "land", "air", "water"), weights)
    assert one.classes == ("land", "water", "air")
    p = (3 * y @ weights).softmax(1)
    want = torch.stack([p[:, [0, 2]].sum(1), p[:, [1, 4]].sum(1), p[:, 3]], 1)
    torch.testing.assert_close(one.logits(y, 3.0).softmax(1), want)
    torch.testing.assert_close(one.directions[:, 0], weights[:, [0, 2]].mean(1))
    plain = LabelSet(tuple("abcde"), weights)
    assert torch.equal(plain.logits(y), y @ weights)
    assert torch.equal(plain.directions, weights)


@pytest.mark.parametrize("names", [None, '["a"]', '["a", "a"]'])
def test_names_and_weights_belong_together(tmp_path, names):
    save_file({"weights": torch.zeros(6, 2)}, tmp_path / FILE, {"labels": names} if names else None)
    with pytest.raises(BadArtifact, match="labels for weights of shape"):
        load_label_set(tmp_path)
