"""The training loop: recovery, restarts, resumption, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patches.sae_files import load_sae
from registry.errors import ConfigError
from tests.training.clip_sae.planted import ACTIVE, ATOMS, METHODS, SMALL, D, planted
from training.clip_sae import train as training
from training.clip_sae.dictionary import Dictionary
from training.clip_sae.quality import mean_max_cosine
from training.clip_sae.train import train


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_dictionary_is_recovered(method):
    chunks, atoms = planted()
    sae, curve = train(METHODS[method], chunks)
    assert mean_max_cosine(sae.decoder, atoms) > 0.9
    assert curve[-1]["unexplained"] < curve[0]["unexplained"]
    x = chunks(10_000)
    back = sae.decode(sae.encode(x), x)
    assert (x - back).square().sum() < 0.1 * (x - x.mean(0)).square().sum()  # on raw inputs: the scale was folded in


@pytest.mark.parametrize("method", METHODS)
def test_rows_stay_unit_and_gradients_cross_them(method, monkeypatch):
    chunks, _ = planted()
    seen = []

    def checked(weight, across=training.across_rows):
        seen.append((weight.detach().norm(dim=1) - 1).abs().max())
        across(weight)
        seen.append((weight.grad * weight).sum(1).abs().max() / weight.grad.norm(dim=1).max().clamp_min(1e-9))

    monkeypatch.setattr(training, "across_rows", checked)
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


def test_a_chunk_smaller_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match="holds no batch of 1024"):
        train(SMALL, lambda _: torch.randn(100, D))


@pytest.mark.slow
def test_several_processes_train_one_dictionary(tmp_path):
    """accelerate launch: every process reads other chunks, and all end with the same dictionary, which is right."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from tests.training.clip_sae.planted import METHODS, planted\n"
        "from training.clip_sae.train import train\n"
        "from patches.mechanisms.features import save_sae\n"
        "sae, _ = train(METHODS['batchtopk'], planted()[0])\n"
        f"save_sae(sae, Path({str(tmp_path)!r}) / os.environ['RANK'])\n"
    )
    root = Path(__file__).parents[3]
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
