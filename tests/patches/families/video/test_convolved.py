"""Convolutional tokenizers by folder: codes are their libraries' own, a Toto with one is saved, read and rolled out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from patches.families.base import load_base
from patches.families.video import base as checkpoints
from patches.families.video import convolved
from patches.families.video.tokens import RESERVED, TokenVideo
from patches.families.video.worker import Clip, VideoWorker
from patches.subject import Subject
from registry.errors import BadArtifact, ConfigError, Invalid, NotFound
from training.toto import RECIPES, fit, learn
from training.toto.fit import tokenizer
from training.toto.sizes import SIZES


def vq(folder: Path) -> Path:
    torch.manual_seed(0)
    net = VQModel(block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                  up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=4, num_vq_embeddings=16,
                  mid_block_add_attention=False)  # fmt: skip
    torch.nn.init.normal_(net.quantize.embedding.weight)
    net.save_pretrained(folder)
    return folder


def dvae(folder: Path) -> Path:
    torch.manual_seed(0)
    config = FlavaImageCodebookConfig(num_groups=3, num_blocks_per_group=1, hidden_size=4, vocab_size=16)
    FlavaImageCodebook(config).save_pretrained(folder)
    return folder


KINDS = {"vq": vq, "dvae": dvae}


def clips(n: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 4, 3, 16, 16), generator=g, dtype=torch.uint8)


def token_model(folder: Path) -> TokenVideo:
    return learn.new(SIZES["tiny"], convolved.read(folder), 4, 16).eval()


def test_codes_and_pictures_are_those_of_diffusers(tmp_path: Path) -> None:
    found, theirs = convolved.read(vq(tmp_path)), VQModel.from_pretrained(tmp_path).eval()
    video = clips()
    x = video.flatten(0, 1).float() / 127.5 - 1
    codes = found.encode(video)
    assert found.cell == 4
    assert codes.shape == (2, 4, 16)
    assert len(codes.unique()) > 3
    with torch.no_grad():
        want = (theirs(x).sample / 2 + 0.5).clamp(0, 1).view(2, 4, 3, 16, 16)
    torch.testing.assert_close(found.decode(codes, 16), want, atol=1e-4, rtol=1e-4)


def test_codes_are_those_of_the_dvae_of_transformers(tmp_path: Path) -> None:
    found = convolved.read(dvae(tmp_path))
    theirs = FlavaImageCodebook.from_pretrained(tmp_path).eval()
    video = clips()
    with torch.no_grad():
        want = theirs.get_codebook_indices(0.8 * video.flatten(0, 1).float() / 255 + 0.1).flatten(1)
    assert found.cell == 4
    assert torch.equal(found.encode(video).flatten(0, 1), want)
    with pytest.raises(Invalid, match="no decoder"):
        found.decode(found.encode(video), 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_toto_with_such_a_tokenizer_is_read_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    model = token_model(KINDS[kind](tmp_path / "book"))
    checkpoints.save(model, tmp_path / "toto")
    again = checkpoints.read(tmp_path / "toto").eval()
    assert isinstance(again, TokenVideo)
    assert torch.equal(again.surprise(clips()), model.surprise(clips()))
    if kind == "vq":
        made, off = again.rollout(clips(), 2)
        assert made.shape == (2, 4, 3, 16, 16)
        assert off.shape == (2, 2, 16)
        assert not torch.equal(again.rollout(clips(), 2, expected=True)[0], made)
    else:
        with pytest.raises(Invalid, match="no decoder"):
            again.rollout(clips(), 2)
        base = load_base(f"local-dir:{tmp_path / 'toto'}", "video")
        with Subject(base) as subject, pytest.raises(Invalid, match="no decoder.*surprise"):
            VideoWorker(base, subject.applied).check([Clip(clips()[0], ("rollout",))])
    about = json.loads((tmp_path / "toto" / "tokenizer" / "config.json").read_text())
    before = load_base(f"local-dir:{tmp_path / 'toto'}", "video").digest
    (tmp_path / "toto" / "tokenizer" / "config.json").write_text(json.dumps(about | {"note": "changed"}))
    assert load_base(f"local-dir:{tmp_path / 'toto'}", "video").digest != before, "another tokenizer, another model"


def test_a_recipe_takes_it_in_place_of_k_means(tmp_path: Path, home) -> None:
    short = replace(RECIPES["tiny"], base="tiny:toto-motions", tokenizer=str(vq(tmp_path / "book")), pool=8, steps=2,
                    labels=11, probe_steps=2, val_clips=11)  # fmt: skip
    fit(short, tmp_path / "out")
    model = checkpoints.read(tmp_path / "out")
    assert isinstance(model, TokenVideo)
    assert isinstance(model.codebook, convolved.Convolved)
    assert model.lm.config.vocab_size == RESERVED + 16
    with pytest.raises(ConfigError, match="no multiple of the tokenizer's cells of 4 px"):
        tokenizer(replace(short, image=18), clips())


def test_folders_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no config\.json.*VQModel"):
        convolved.read(tmp_path)
    folder = vq(tmp_path / "book")
    with pytest.raises(Invalid, match="18 px do not divide"):
        convolved.read(folder).encode(torch.zeros(1, 2, 3, 18, 18, dtype=torch.uint8))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"num_vq_embeddings": 17}))
    with pytest.raises(BadArtifact, match=r"does not fit config\.json"):
        convolved.read(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(BadArtifact, match="'clip' is no tokenizer"):
        convolved.read(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(BadArtifact, match="cannot be read"):
        convolved.read(folder)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadArtifact, match="Pickles are not read"):
        convolved.read(folder)


def test_a_llama_and_a_tokenizer_of_different_sizes_are_refused(tmp_path: Path) -> None:
    checkpoints.save(token_model(vq(tmp_path / "book")), tmp_path / "toto")
    file = tmp_path / "toto" / "tokenizer"
    torch.manual_seed(0)
    VQModel(block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=4, num_vq_embeddings=9,
            mid_block_add_attention=False).save_pretrained(file)  # fmt: skip
    with pytest.raises(BadArtifact, match="20 ids, its tokenizer 13"):
        checkpoints.read(tmp_path / "toto")
