import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from patches.engine.read import record, upto
from patches.mechanisms.features import SAE, load_sae
from registry.errors import ConfigError
from training.clip_sae import dictionary as trainer
from training.clip_sae.dictionary import Dictionary, Quality, SAEConfig, activations, mean_max_cosine, train

D, ATOMS, ACTIVE = 64, 64, 3


def planted(seed=0, size=4096):
    """Tokens that are sparse sums of known atoms around a mean, and the atoms."""
    g = torch.Generator().manual_seed(100 + seed)
    atoms = normalize(torch.randn(ATOMS, D, generator=g), dim=1)
    mean = torch.randn(D, generator=g)

    def chunk(number):
        g = torch.Generator().manual_seed(1000 * seed + number)
        on = torch.rand(size, ATOMS, generator=g).topk(ACTIVE, 1).indices
        f = torch.zeros(size, ATOMS).scatter_(1, on, 1 + torch.rand(size, ACTIVE, generator=g))
        return 5.0 * (f @ atoms) + mean + 0.01 * torch.randn(size, D, generator=g)

    return chunk, atoms


SMALL = SAEConfig(features=128, k=ACTIVE, steps=200, batch=1024, warmup=20, dead_after=50, lr=6e-3)
METHODS = {
    "topk": replace(SMALL, method="topk"),
    "batchtopk": replace(SMALL, method="batchtopk"),
    "vanilla": replace(SMALL, method="vanilla", l1=3e-3, steps=400),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_dictionary_is_recovered(method):
    chunks, atoms = planted()
    sae, curve = train(METHODS[method], chunks)
    assert mean_max_cosine(sae.decoder, atoms) > 0.9
    assert curve[-1]["unexplained"] < curve[0]["unexplained"]
    x = chunks(10_000)
    back = sae.decode(sae.encode(x), x)
    assert (x - back).square().sum() < 0.1 * (x - x.mean(0)).square().sum()  # on raw inputs: the scale was folded in


@pytest.mark.parametrize("how", ["none", "scale", "layer_norm", "norm"])
def test_what_ships_computes_what_was_trained(how):
    """Folding the data set's scale, or storing the token's, changes no reconstruction."""
    chunks, _ = planted()
    x = chunks(0)
    inner = Dictionary(replace(METHODS["topk"], normalise=how), D)
    inner.start(x)
    inner.bias.data += 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(1))
    _, share, _ = inner(x)
    sae = inner.ship()
    n = inner.normal(x)
    f = sae.encode(x)
    back = inner.normal(sae.decode(f, x)) if how in ("none", "scale") else f @ sae.decoder + sae.decoder_bias
    torch.testing.assert_close((n - back).square().sum() / (n - n.mean(0)).square().sum(), share, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True], ids=["per token", "per batch"])
def test_sparse_gradients_are_the_dense_ones(whole):
    g = torch.Generator().manual_seed(3)
    x, noise = (
        torch.randn(200, D, generator=g, dtype=torch.double),
        torch.randn(200, D, generator=g, dtype=torch.double),
    )
    E, W = (torch.randn(96, D, generator=g, dtype=torch.double).requires_grad_() for _ in range(2))
    b = torch.randn(96, generator=g, dtype=torch.double).requires_grad_()
    values, rows, features = trainer._Encode.apply(x, E, b, 5, whole)
    (trainer._Decode.apply(values.relu(), rows, features, W, 200) - noise).square().sum().backward()
    sparse = [p.grad.clone() for p in (E, b, W)]
    for p in (E, b, W):
        p.grad = None
    pre = x @ E.T + b
    kth = pre.flatten().topk(1000).values[-1] if whole else pre.topk(5, 1).values[:, -1:]
    ((pre.relu() * (pre >= kth)) @ W - noise).square().sum().backward()
    for mine, dense in zip(sparse, (E.grad, b.grad, W.grad), strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-9, rtol=1e-9)


def test_the_largest_of_many_are_found_whatever_their_order():
    g = torch.Generator().manual_seed(4)
    for flat in (torch.randn(200_000, generator=g), torch.arange(200_000.0), torch.zeros(200_000)):
        got = flat[trainer._largest(flat, 3000)].sort().values
        assert torch.equal(got, flat.topk(3000).values.sort().values)


@pytest.mark.parametrize("method", METHODS)
def test_rows_stay_unit_and_gradients_cross_them(method, monkeypatch):
    chunks, _ = planted()
    seen = []

    def checked(weight, across=trainer.across_rows):
        seen.append((weight.detach().norm(dim=1) - 1).abs().max())
        across(weight)
        seen.append((weight.grad * weight).sum(1).abs().max() / weight.grad.norm(dim=1).max().clamp_min(1e-9))

    monkeypatch.setattr(trainer, "across_rows", checked)
    sae, _ = train(replace(METHODS[method], steps=25), chunks)
    assert len(seen) == 50
    assert max(seen) < 1e-6
    assert ((sae.decoder.norm(dim=1) - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(method, tmp_path):
    chunks, _ = planted()
    config = replace(METHODS[method], steps=30, passes=2, dead_after=5)
    whole, _ = train(config, chunks)

    def until(number):  # the machine dies while it reads the third chunk
        if number == 2:
            raise KeyboardInterrupt
        return chunks(number)

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(config, until, checkpoint=file, every=6)
    assert file.is_file()
    resumed, _ = train(config, chunks, checkpoint=file, every=100)
    for name in ("encoder", "bias", "decoder", "decoder_bias", "threshold"):
        a, b = getattr(whole, name), getattr(resumed, name)
        assert (a is None and b is None) or torch.equal(a, b)
    with pytest.raises(ConfigError, match="another training"):
        train(replace(config, lr=1e-4), chunks, checkpoint=file)


def test_topk_fires_at_most_k_and_batchtopk_as_many_on_average():
    chunks, _ = planted()
    topk, _ = train(replace(METHODS["topk"], steps=60), chunks)
    assert ((topk.encode(chunks(50)) > 0).sum(1) <= ACTIVE).all()
    shared, _ = train(replace(METHODS["batchtopk"], steps=60), chunks)
    assert shared.activation == "jumprelu"
    assert abs((shared.encode(chunks(50)) > 0).sum(1).float().mean() - ACTIVE) < 0.3


@pytest.mark.parametrize("method", ["batchtopk", "vanilla"])
def test_dead_features_begin_again(method, monkeypatch):
    """Half of just enough features start out of reach; left alone they stay there and half the atoms are not found."""
    chunks, atoms = planted()
    start = Dictionary.start

    def far(self, x):
        start(self, x)
        self.bias.data[::2] -= 6.0

    monkeypatch.setattr(Dictionary, "start", far)
    config = replace(METHODS[method], features=ATOMS, steps=250, dead_after=10)
    left, curve = train(replace(config, dead="leave"), chunks)
    again, mended = train(config, chunks)
    assert curve[-1]["dead"] >= 30
    assert mended[-1]["dead"] <= 3
    assert mean_max_cosine(left.decoder, atoms) < 0.8 < 0.9 < mean_max_cosine(again.decoder, atoms)


@pytest.mark.parametrize("method", METHODS)
def test_auxiliary_gradients_reach_dead_features_and_only_then(method):
    x = planted()[0](0)
    for dead, reached in (("auxiliary", True), ("leave", False)):
        inner = Dictionary(replace(METHODS[method], dead=dead), D)
        inner.start(x)
        inner.bias.data[:20] -= 50.0
        inner.idle[:20] = 1000
        inner(x)[0].backward()
        assert bool(inner.decoder.grad[:20].any()) is reached
        assert bool(inner.encoder.grad[:20].any()) is reached
        assert inner.encoder.grad[20:].any()


def test_quality_knows_an_exact_copy_and_a_mean_predictor():
    x = planted()[0](0)[:900].view(100, 9, D)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    copy = SAE(both, torch.zeros(2 * D), both, torch.zeros(D))
    quality = Quality(copy)
    for part in x.split(30):
        quality.add(part)
    result = quality.result()
    assert abs(result["all"]["explained_variance"] - 1) < 1e-6
    assert result["all"]["l0_mean"] == D
    assert result["cls"]["tokens"] == 100
    assert result["patches"]["tokens"] == 800
    assert len(result["l0_map"]) == 9
    flat = x.reshape(-1, D)
    for name, part in (("all", flat), ("cls", x[:, 0]), ("patches", x[:, 1:].reshape(-1, D))):
        mean = SAE(torch.zeros(1, D), torch.zeros(1), torch.eye(D)[:1], part.mean(0))
        quality = Quality(mean)
        quality.add(x)
        assert abs(quality.result()[name]["explained_variance"]) < 1e-5
    assert trainer.principal_variance(flat, D) == pytest.approx(1.0)
    assert 0.3 < trainer.principal_variance(flat, 12) < 0.95


def test_densities_count_features_by_how_often_they_fire():
    x = torch.zeros(1000, 1, 4)
    x[:, 0, 0], x[:10, 0, 1], x[0, 0, 2] = 1.0, 1.0, 1.0  # always, 1 %, 0.1 %, never
    quality = Quality(SAE(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4)))
    quality.add(x)
    part = quality.result()["all"]
    assert part["alive"] == 0.75
    assert dict(zip(trainer.BINS, part["density"], strict=False)) | {} == {
        b: int(b in (-3.0, -2.0, -0.5)) for b in trainer.BINS[:-1]
    }


def test_activations_end_at_the_site_and_keep_the_asked_tokens(tiny_clip):
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    site = "visual.transformer.resblocks.1"
    reached = []
    hook = tiny_clip.model.visual.transformer.resblocks[2].register_forward_hook(lambda *_: reached.append(1))
    try:
        x = upto(tiny_clip.model, [site], image=images)[site]
        mlp = "visual.transformer.resblocks.0.mlp"
        both = upto(tiny_clip.model, [mlp, site], image=images)
        with record(tiny_clip.model, [mlp]) as whole:
            upto(tiny_clip.model, [site], image=images)
        got = {
            w: activations(tiny_clip.model, site, lambda _: images, w, batch=4)(0) for w in ("all", "cls", "patches")
        }
    finally:
        hook.remove()
    assert not reached
    assert torch.equal(both[site], x)
    assert torch.equal(both[mlp], whole[mlp][0])
    torch.testing.assert_close(got["all"].view(x.shape), x)
    torch.testing.assert_close(got["cls"], x[:, 0])
    torch.testing.assert_close(got["patches"], x[:, 1:].reshape(-1, x.shape[-1]))


def test_a_chunk_smaller_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match="holds no batch of 1024"):
        train(SMALL, lambda _: torch.randn(100, D))


@pytest.mark.slow
def test_several_processes_train_one_dictionary(tmp_path):
    """accelerate launch: every process reads other chunks, and all end with the same dictionary, which is right."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from tests.training.clip_sae.test_dictionary import METHODS, planted\n"
        "from training.clip_sae.dictionary import train\n"
        "from patches.mechanisms.features import save_sae\n"
        "sae, _ = train(METHODS['batchtopk'], planted()[0])\n"
        f"save_sae(sae, Path({str(tmp_path)!r}) / os.environ['RANK'])\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", str(script)],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    a, b = (load_sae(tmp_path / str(rank)) for rank in (0, 1))
    assert torch.equal(a.decoder, b.decoder)
    assert mean_max_cosine(a.decoder, planted()[1]) > 0.9
