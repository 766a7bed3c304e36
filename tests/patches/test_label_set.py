"""A probe that travels with a patch: the same back, and nothing that does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from patches.label_set import FILE, LabelSet, load_label_set, save_label_set
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


@pytest.mark.parametrize("names", [None, '["a"]', '["a", "a"]'])
def test_names_and_weights_belong_together(tmp_path, names):
    save_file({"weights": torch.zeros(6, 2)}, tmp_path / FILE, {"labels": names} if names else None)
    with pytest.raises(BadArtifact, match="names for weights of shape"):
        load_label_set(tmp_path)
