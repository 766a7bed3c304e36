"""Pipelines in the hub's own layout become bases that draw what stock diffusers draws; wrong folders are refused in
words."""

import json

import pytest
import torch

from patches.engine.patch import apply
from patches.families import diffusion
from patches.families.base import load_base
from patches.families.diffusion import Denoiser, Denoising, lab
from patches.families.diffusion.packed import load_packed, pack
from patches.families.diffusion.schedule import noise
from patches.families.diffusion.small import kandinsky_folder, stable_folder, unclip_folder
from registry.errors import BadArtifact, Invalid, NotFound, WrongBase


def drawn(base, row):
    on = apply(base.model, {}, root=base.root)
    Denoiser(type("S", (), {"base": base, "applied": on})()).run([row])
    on.revert()
    return row.picture


def test_a_stable_diffusion_folder_draws_what_diffusers_draws(tmp_path):
    pipe = stable_folder(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    base = load_base(f"local-dir:{tmp_path}", "diffusion")
    row = Denoising(
        condition=base.model.text(["a cat"])[0], guidance=4.0, steps=4, solver="", seed=3, other_patched=True
    )
    want = pipe("a cat", num_inference_steps=4, guidance_scale=4.0, latents=noise(base.model.shape, 3)[None],
                output_type="pt").images[0]  # fmt: skip
    torch.testing.assert_close(drawn(base, row), want.float(), atol=1e-4, rtol=1e-3)
    again = load_base(f"local-dir:{tmp_path}", "diffusion")
    assert again.digest == base.digest


def test_a_kandinsky_folder_draws_what_diffusers_draws(tmp_path):
    pipe = kandinsky_folder(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    base = load_base(f"local-dir:{tmp_path}", "diffusion")
    told, null = base.model.image(torch.rand(1, 3, 16, 16))[0], base.model.null()
    row = Denoising(condition=told, guidance=4.0, steps=4, solver="ddim", seed=3)
    got = drawn(base, row)
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(dict(base.model.schedule.config))
    want = pipe(image_embeds=told["image"][None], negative_image_embeds=null["image"][None], num_inference_steps=4,
                guidance_scale=4.0, latents=noise(base.model.shape, 3)[None], height=16, width=16,
                output_type="pt").images[0]  # fmt: skip
    torch.testing.assert_close(got, (want.float() / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-3)
    with pytest.raises(Invalid, match="not words"):
        base.model.text(["a cat"])


def test_an_unclip_folder_draws_what_diffusers_draws(tmp_path):
    pipe = unclip_folder(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    base = load_base(f"local-dir:{tmp_path}", "diffusion")
    picture = torch.rand(1, 3, 16, 16)
    told = {**base.model.image(picture)[0], "text": base.model.text(["a cat"])[0]["text"]}
    stock = type(pipe).noise_image_embeddings
    # level 0 still adds a little random noise to the embedding; a counterfactual wants none
    pipe.noise_image_embeddings = lambda image_embeds, noise_level, generator=None: stock(
        pipe, image_embeds, noise_level, noise=torch.zeros_like(image_embeds)
    )
    for kind, condition in (("both", told), ("words alone", base.model.text(["a cat"])[0])):
        row = Denoising(condition=condition, guidance=4.0, steps=4, solver="", seed=3)
        if kind == "words alone":  # the pipeline cannot say this; ours must equal it told nothing in both halves
            pipe.noise_image_embeddings = lambda image_embeds, noise_level, generator=None: torch.zeros(1, 48)
        want = pipe(prompt="a cat", image_embeds=told["image"][None], num_inference_steps=4, guidance_scale=4.0,
                    latents=noise(base.model.shape, 3)[None], output_type="pt").images[0]  # fmt: skip
        torch.testing.assert_close(drawn(base, row), want.float(), atol=1e-4, rtol=1e-3)
    assert load_base(f"local-dir:{tmp_path}", "diffusion").digest == base.digest
    other = diffusion.changed(base.model, picture[0], decode=False)
    assert float(other.condition["image"].abs().sum()) > 0
    (tmp_path / "image_normalizer" / "config.json").unlink()
    with pytest.raises(NotFound, match="image_normalizer"):
        load_base(f"local-dir:{tmp_path}", "diffusion")


def test_folders_that_are_not_read_say_why(tmp_path):
    with pytest.raises(NotFound, match=r"model_index.json"):
        load_base(f"local-dir:{tmp_path}", "diffusion")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(NotFound, match="FluxPipeline"):
        load_base(f"local-dir:{tmp_path}", "diffusion")
    with pytest.raises(NotFound, match="lab:diffusion"):
        load_base("somewhere", "diffusion")
    stable_folder(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(NotFound, match="safetensors"):
        load_base(f"local-dir:{tmp_path}", "diffusion")


@pytest.fixture(scope="module")
def lab_base():
    return load_base("lab:diffusion", "diffusion")


def test_the_lab_model_states_its_encoder_and_refuses_another(lab_base, tiny_clip):
    assert lab_base.model.about["zero_rows"] == [2491, 2492]
    with pytest.raises(WrongBase, match="text states"):
        lab.check_encoder(tiny_clip, lab_base.model.about["encoder"])


def test_the_lab_model_refuses_text_states_it_was_not_trained_on(lab_base, monkeypatch):
    """With the two rows of lab:clip as they ship, the states are others, and the folder says so."""
    plain = lab.build
    monkeypatch.setattr(lab, "build", lambda u, p, e, s, rows: plain(u, p, e, s, []))
    with pytest.raises(BadArtifact, match="text states"):
        lab.read(diffusion.base.SHIPPED / "diffusion")


def test_the_lab_model_draws_a_picture_of_its_size(lab_base):
    row = Denoising(condition=lab_base.model.text(["a picture of a dog face"])[0], guidance=3.0, steps=2)
    assert drawn(lab_base, row).shape == (3, 64, 64)


@pytest.mark.parametrize(("bits", "group", "off"), [(8, 0, 0.006), (4, 32, 0.1)])
def test_packed_weights_come_back_to_the_scale(tmp_path, bits, group, off):
    g = torch.Generator().manual_seed(0)
    state = {"a.weight": torch.randn(7, 9, generator=g), "b.weight": torch.randn(4, 3, 3, 3, generator=g),
             "a.bias": torch.randn(7, generator=g)}  # fmt: skip
    pack(state, tmp_path / "model.packed.safetensors", bits, group)
    again = load_packed(tmp_path)
    for k, v in state.items():
        assert again[k].shape == v.shape
        assert float((again[k] - v).abs().max()) <= off * float(v.abs().max()) + 2e-3


def test_pictures_go_through_mlflows_table(tmp_path):
    import pandas as pd

    from patches.subject import Subject

    subject = Subject({"base": load_base("tiny", "diffusion")}, about=diffusion.FAMILY)
    got = subject.predict(pd.DataFrame({"prompt": ["a cat", "sun"]}), {"steps": 2})
    back = subject.predict(pd.DataFrame({"image": [got["image"][0]]}), {})
    assert list(back.columns) == ["image"]
    with pytest.raises(Invalid, match="Row 0: it has neither"):
        subject.predict(pd.DataFrame({"prompt": [""]}), {})
    subject.close()
