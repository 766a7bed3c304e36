"""Populations: trained many at a time, read from folders of adapters, converted from the published layout."""

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import Generator

from patches.engine.patch import apply
from patches.families.base import load_base
from patches.families.diffusion import Adapter, write_adapter
from patches.mechanisms.subspace import Layer, dense, linear_layers, size, split, start
from registry.errors import BadArtifact, ConfigError
from training.w2w import people, population
from training.w2w.config import RECIPES
from training.w2w.fit import fit

TINY = RECIPES["tiny"]


@pytest.fixture(scope="module")
def base():
    return load_base("tiny:faces", "diffusion")


def shots(base, k, m=3):
    g = Generator().manual_seed(1)
    text = base.model.null()["text"]
    latents = torch.randn(k, m, *base.model.shape, generator=g)
    return population.Shots(latents, lambda index, g: {"text": text.expand(len(index), *text.shape)})


def test_training_lowers_each_ones_loss_and_leaves_the_base_bit_for_bit(base):
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    layers, log = linear_layers(base.model, ("to_v", "to_out"), under="denoiser"), []
    theta = population.train(base.model, layers, shots(base, 4), steps=25, rows=4, lr=5e-2, log=log)
    assert sum(log[-5:]) < sum(log[:5])
    assert theta.shape == (4, size(layers))
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert not (theta[0] - theta[1]).abs().max() < 1e-3


def test_people_are_drawn_alike_whoever_is_asked_for_beside_them(base):
    some = people.people(TINY, base.model, [3, 5])
    other = people.people(TINY, base.model, [5])
    assert torch.equal(some.labels[1], other.labels[0])
    assert torch.equal(some.image[1], other.image[0])
    assert some.image.shape == (2, TINY.shots, 3, 64, 64)
    assert len(people.people(replace(TINY, seed=1), base.model, [5]).labels) == 1


def test_a_population_that_was_interrupted_goes_on_and_is_the_same(base, tmp_path):
    layers = linear_layers(base.model, ("to_v",), under="denoiser")
    made, asked = population.create(tmp_path / "p", layers, 1.0, ("a",)), []

    def make(which):
        asked.append(list(which))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return torch.full((len(which), 4), float(which.start)), torch.zeros(len(which), 1)

    with pytest.raises(KeyboardInterrupt):
        population.fill(made, 5, 2, make)
    again = population.create(tmp_path / "p", layers, 1.0, ("a",))
    population.fill(again, 5, 2, make)
    assert asked == [[0, 1], [2, 3], [2, 3], [4]]
    assert again.theta()[:, 0].tolist() == [0, 0, 2, 2, 4]
    assert len(again) == 5
    with pytest.raises(ConfigError, match="other layers"):
        population.create(tmp_path / "p", layers, 2.0, ("a",))


def adapter(seed, rank=2, d=6, layers=("x.to_q", "y.to_v")):
    g = Generator().manual_seed(seed)
    return {n: (torch.randn(rank, d, generator=g), torch.randn(d, rank, generator=g)) for n in layers}


def write(folder, made):
    write_adapter(Adapter(made), folder)


def test_a_folder_of_adapters_is_a_population_in_any_form(tmp_path):
    made = [adapter(i) for i in range(4)]
    for i, factors in enumerate(made):
        write(tmp_path / f"p{i}", factors)
    names, read = population.read_folder(tmp_path)
    assert names == ["p0", "p1", "p2", "p3"]
    for form, rank in (("raw", 2), ("canonical", 2), ("update", 2)):
        layers, theta = population.gather(read, form, rank)
        for row, factors in zip(theta, made, strict=True):
            for layer, (a, b) in zip(layers, split(layers, row), strict=True):
                want = factors[layer.site][1] @ factors[layer.site][0]
                torch.testing.assert_close(dense(a, b), want, atol=1e-4, rtol=1e-4)


def test_the_canonical_form_forgets_how_an_update_was_factored():
    g = Generator().manual_seed(0)
    a, b, mix = torch.randn(2, 7, generator=g), torch.randn(5, 2, generator=g), torch.randn(2, 2, generator=g)
    one, other = population.canonical(a, b, 2), population.canonical(mix @ a, b @ torch.linalg.inv(mix), 2)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    wide = population.canonical(a, b, 3)
    assert wide[0].shape == (3, 7)
    torch.testing.assert_close(wide[1] @ wide[0], b @ a, atol=1e-4, rtol=1e-4)


def test_adapters_that_do_not_belong_together_are_refused(tmp_path):
    for i in range(3):
        write(tmp_path / f"p{i}", adapter(i, layers=("x.to_q",) if i == 1 else ("x.to_q", "y.to_v")))
    with pytest.raises(ConfigError, match=r"y\.to_v"):
        population.read_folder(tmp_path)
    write(tmp_path / "p1", adapter(1, d=7))
    with pytest.raises(ConfigError, match="another shape"):
        population.read_folder(tmp_path)
    write(tmp_path / "p1", adapter(1, rank=3))
    _, read = population.read_folder(tmp_path)
    with pytest.raises(ConfigError, match="several ranks"):
        population.gather(read, "raw")
    bad = adapter(1)
    bad["x.to_q"][0][0, 0] = float("nan")
    write(tmp_path / "p1", bad)
    with pytest.raises((BadArtifact, ConfigError), match="finite|NaN"):
        population.read_folder(tmp_path)
    for name in ("p1", "p2"):
        for file in (tmp_path / name).iterdir():
            file.unlink()
    with pytest.raises(ConfigError, match="three or more"):
        population.read_folder(tmp_path)


def test_a_folder_of_adapters_is_fitted_and_its_space_draws(base, tmp_path, monkeypatch):
    layers = linear_layers(base.model, ("to_v", "to_q"), under="denoiser")
    labels = {}
    for i in range(8):
        theta = start(layers) + 0.2 * torch.randn(size(layers), generator=Generator().manual_seed(i))
        pairs = {x.site.removeprefix("denoiser."): ab for x, ab in zip(layers, split(layers, theta), strict=True)}
        write(tmp_path / "in" / f"p{i}", pairs)
        labels[f"p{i}"] = {"tall": i % 2, "odd": int(i > 3)}
    (tmp_path / "in" / "labels.json").write_text(json.dumps(labels))
    for form in ("raw", "canonical", "update"):
        config = replace(TINY, population=f"adapters:{tmp_path / 'in'}", val=0, held=0, components=(3,), form=form)
        made = fit(config, tmp_path / form)
        assert made.config["attributes"] == ["odd", "tall"]
        from patches import artifact

        _, patch = artifact.load(tmp_path / form)
        with torch.no_grad(), apply(base.model, {"patch": patch}):
            text = base.model.null()["text"][None]
            out = base.model(sample=torch.zeros(1, *base.model.shape), timestep=torch.tensor([5.0]), text=text)
        assert bool(out.isfinite().all())
    (tmp_path / "in" / "p3" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError):
        fit(replace(config, base="tiny:stable"), tmp_path / "none")


def published(folder, layers, n=12, m=3, scale=1.0):
    """A space in the authors' layout: one flat vector in key order, z-scored, V, proj; saved by torch as they did."""
    g = Generator().manual_seed(0)
    theta = torch.cat([torch.randn(n, sum(x.sizes), generator=g) * (1 + i) for i, x in enumerate(layers)], 1)
    mean, std = theta.mean(0), theta.std(0)
    _, _, v = torch.linalg.svd((theta - mean) / std, full_matrices=False)
    basis = v[:m].T.contiguous()
    proj = ((theta - mean) / std) @ basis
    folder.mkdir()
    dimensions = OrderedDict()
    for x in layers:
        for letter, shape in (("A", x.a), ("B", x.b)):
            key = f"base_model.model.{x.site.removeprefix('denoiser.')}.lora_{letter}.identity1.weight"
            dimensions[key] = ((torch.Size(shape).numel(),), torch.Size(shape))
    saved = {"V": basis, "mean": mean, "std": std, "proj_3pc": proj, "weight_dimensions": dimensions}
    for name, value in saved.items():
        torch.save(value, folder / f"{name}.pt")
    labels = {str(i): {"young": i % 2, "chubby": int(i < 5)} for i in range(n)}
    (folder / "labels.json").write_text(json.dumps(labels))
    return mean, std, basis, proj, labels


def test_the_published_layout_edited_by_the_papers_formulas_gives_our_weights(base, tmp_path):
    """theta' = ((beta + alpha n) V^T) sd + mean with n = P^+ l, written out by hand, against fold of our patch."""
    from patches import artifact

    layers = sorted(linear_layers(base.model, ("to_q", "to_v"), under="denoiser"), key=lambda x: x.site)
    mean, std, basis, proj, labels = published(tmp_path / "w2w", layers)
    place = f"published:{tmp_path / 'w2w'}"
    config = replace(TINY, population=place, components=(3,), directions=("paper",), scale=27.0)
    fit(config, tmp_path / "out")
    _, patch = artifact.load(tmp_path / "out")
    young = torch.tensor([2.0 * labels[str(i)]["young"] - 1 for i in range(len(proj))])
    n = torch.linalg.pinv(proj) @ young
    beta, alpha = proj[4], 3.7
    theta = ((beta + alpha * n) @ basis.T) * std + mean
    spread = proj.std(0)
    i = patch.config.attributes.index("young")
    step = alpha * (n / spread).norm() / patch.tensors["gap"][i]
    z = patch.move(beta / spread, {"young": float(step)})
    cosine = torch.nn.functional.cosine_similarity(patch.tensors["directions"][i], n / spread, 0)
    assert cosine > 0.9999
    by_hand = dict(zip([x.site for x in layers], split(layers, theta), strict=True))
    folded = patch.at(z).fold(base.model)
    for site, (a, b) in by_hand.items():
        want = base.model.get_submodule(site).weight + 27.0 * b @ a
        got = folded.get_submodule(site).weight
        moved = (want - base.model.get_submodule(site).weight).norm()
        assert float((got - want).norm() / moved) < 1e-4


def test_a_published_space_that_does_not_add_up_is_refused(base, tmp_path):
    layers = (Layer("denoiser.blocks.0.attn1.to_q", (1, 4), (4, 1)),)
    published(tmp_path / "w2w", layers)
    torch.save(OrderedDict({"x.lora_B.weight": ((4,), (4, 1))}), tmp_path / "w2w" / "weight_dimensions.pt")
    with pytest.raises(BadArtifact, match="A, B, A, B"):
        population.read_published(tmp_path / "w2w")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w2w" / "weight_dimensions.pt")
    with pytest.raises(BadArtifact, match="more than tensors"):
        population.read_published(tmp_path / "w2w")
