"""Adapters: what is written is drawn alike by peft, by stock diffusers and by a folded copy; what would be lost in
silence is refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from patches.adapters import (
    DIFFUSERS,
    PEFT,
    PEFT_CONFIG,
    Adapter,
    read_adapter,
    truncated,
    write_adapter,
)
from patches.families import diffusion
from registry.errors import BadArtifact, NotFound


@pytest.fixture(scope="module")
def unet():
    return diffusion.FAMILY.purposes["stable"]().model.denoiser


@pytest.fixture(scope="module")
def adapter(unet):
    g = torch.Generator().manual_seed(0)
    factors = {}
    for i, (name, m) in enumerate(unet.named_modules()):
        if name.endswith(("to_q", "to_v")):
            rank = 1 + i % 2
            factors[name] = (
                torch.randn(rank, m.in_features, generator=g),
                torch.randn(m.out_features, rank, generator=g),
            )
    return Adapter(factors)


def out(unet):
    g = torch.Generator().manual_seed(1)
    x, c = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 20, 32, generator=g)
    with torch.inference_mode():
        return unet(x, torch.tensor([3.0, 700.0]), c, return_dict=False)[0]


def folded(unet, adapter):
    made = copy.deepcopy(unet)
    adapter.fold(made)
    return out(made)


def test_stock_diffusers_loads_what_is_written(unet, adapter, tmp_path):
    write_adapter(adapter, tmp_path)
    other = copy.deepcopy(unet)
    other.load_lora_adapter(str(tmp_path), weight_name=DIFFUSERS, prefix="unet")
    torch.testing.assert_close(out(other), folded(unet, adapter), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out(other), out(unet), atol=1e-2)


def test_peft_loads_what_is_written(unet, adapter, tmp_path):
    from peft import PeftModel

    write_adapter(adapter, tmp_path)
    other = PeftModel.from_pretrained(copy.deepcopy(unet), str(tmp_path))
    torch.testing.assert_close(out(other), folded(unet, adapter), atol=1e-4, rtol=1e-4)


def test_what_diffusers_and_peft_write_is_read_with_its_scale(unet, tmp_path):
    from peft import LoraConfig

    other = copy.deepcopy(unet)
    other.add_adapter(LoraConfig(r=2, lora_alpha=27, target_modules=["to_q", "to_v"], init_lora_weights=False))
    other.save_lora_adapter(str(tmp_path / "d"), weight_name="a.safetensors")
    got = read_adapter(tmp_path / "d" / "a.safetensors", unet)
    torch.testing.assert_close(folded(unet, got), out(other), atol=1e-4, rtol=1e-4)
    write_adapter(got, tmp_path / "p")
    again = read_adapter(tmp_path / "p", unet)
    assert all(torch.allclose(again.factors[k][i], got.factors[k][i]) for k in got.factors for i in (0, 1))
    for name in (PEFT, DIFFUSERS):
        one = read_adapter(tmp_path / "p" / name, unet)
        assert one.factors.keys() == got.factors.keys()


def test_a_canonical_form_is_the_same_update(unet, adapter):
    torch.testing.assert_close(folded(unet, truncated(adapter, 2)), folded(unet, adapter), atol=1e-4, rtol=1e-4)
    twice = Adapter({k: (3.0 * a, b / 3.0) for k, (a, b) in adapter.factors.items()})
    for k, (a, b) in truncated(twice, 1).factors.items():
        torch.testing.assert_close(a, truncated(adapter, 1).factors[k][0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(b, truncated(adapter, 1).factors[k][1], atol=1e-4, rtol=1e-3)


def spoiled(tmp_path, change):
    state = load_file(tmp_path / PEFT)
    save_file(change(state), tmp_path / PEFT, {"format": "pt"})


BAD = [
    (lambda s: {k.replace("down_blocks", "side_blocks"): v for k, v in s.items()}, "does not have"),
    (lambda s: {k: v for i, (k, v) in enumerate(s.items()) if i}, "alone; every A needs its B"),
    (lambda s: {k: v * torch.nan for k, v in s.items()}, "NaN"),
    (lambda s: {k: v[..., :5].contiguous() for k, v in s.items()}, "another base"),
    (lambda s: {**s, "unet.conv.alpha_beta": torch.ones(1)}, "no LoRA factor"),
]


@pytest.mark.parametrize(("change", "words"), BAD)
def test_an_adapter_of_another_base_is_refused_in_words(unet, adapter, tmp_path, change, words):
    write_adapter(adapter, tmp_path)
    spoiled(tmp_path, change)
    with pytest.raises(BadArtifact, match=words):
        read_adapter(tmp_path, unet)


def test_a_scale_that_only_the_config_knows_is_kept(unet, adapter, tmp_path):
    write_adapter(adapter, tmp_path)
    about = json.loads((tmp_path / PEFT_CONFIG).read_text())
    about |= {"lora_alpha": 2 * about["r"], "alpha_pattern": {}, "rank_pattern": {}}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(about))
    name, (a, b) = next((k, v) for k, v in adapter.factors.items() if v[0].shape[0] == about["r"])
    got = read_adapter(tmp_path, unet).factors[name]
    torch.testing.assert_close(got[1], 2 * b)
    torch.testing.assert_close(got[0], a)
    with pytest.raises(NotFound, match="no adapter"):
        read_adapter(tmp_path / "nothing")
