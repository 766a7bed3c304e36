"""Small random diffusion models with every true interface: under a second once the libraries are imported, offline."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patches.families.base import Base
from patches.families.diffusion import base as bases
from patches.families.diffusion.layout import quiet
from patches.families.diffusion.schedule import Schedule

COSINE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
}
LINEAR = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def tiny(seed: int = 0) -> Base:
    """The lab's layout, 16 px: text states and an image embedding of a random CLIP."""
    from diffusers.models.embeddings import ImageProjection

    from patches.families import clip
    from patches.families.diffusion.lab import build

    encoder = clip.tiny(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = _unet(in_channels=12, out_channels=12, cross_attention_dim=32)
        projection = ImageProjection(24, 32, 2)
    _stir(unet, seed)
    pipe = build(unet, projection, encoder, Schedule(COSINE), [])
    return bases.wrap(f"tiny:{seed}", "tiny-diffusion", pipe)


def stable(seed: int = 0) -> Base:
    """StableDiffusionPipeline's layout, written by diffusers itself and read back."""
    with tempfile.TemporaryDirectory() as folder:
        stable_folder(Path(folder), seed)
        return bases.wrap("tiny:stable", "tiny-stable", bases.read(Path(folder)))


def unclip(seed: int = 0) -> Base:
    """StableUnCLIPImg2ImgPipeline's layout."""
    with tempfile.TemporaryDirectory() as folder:
        unclip_folder(Path(folder), seed)
        return bases.wrap("tiny:unclip", "tiny-unclip", bases.read(Path(folder)))


def kandinsky(seed: int = 0) -> Base:
    """KandinskyV22Pipeline's layout, its prior's image encoder beside it."""
    with tempfile.TemporaryDirectory() as folder:
        kandinsky_folder(Path(folder), seed)
        return bases.wrap("tiny:kandinsky", "tiny-kandinsky", bases.read(Path(folder)))


def faces(seed: int = 0) -> Base:
    """lab:faces' layout, its words and 64 px."""
    from patches.families.diffusion.faces import tiny as small_faces

    return bases.wrap("tiny:faces", "tiny-faces", small_faces(seed))


def stable_folder(folder: Path, seed: int = 0) -> Any:
    """Write a random Stable-Diffusion pipeline of 16 px as the hub would hold it; the diffusers pipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text, vae = _text_encoder(), _autoencoder()
        unet = _unet(in_channels=4, out_channels=4, cross_attention_dim=32)
    _stir(unet, seed)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler.from_config(LINEAR),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with quiet():
        pipe.save_pretrained(folder, safe_serialization=True)
    return pipe


def unclip_folder(folder: Path, seed: int = 0) -> Any:
    """Write a random Stable-unCLIP pipeline of 16 px as the hub would hold it; the diffusers pipeline."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessor

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text, vae, eye = _text_encoder(), _autoencoder(), _vision_encoder()
        unet = _unet(
            in_channels=4,
            out_channels=4,
            cross_attention_dim=32,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=48,
        )
        normalizer = StableUnCLIPImageNormalizer(24)
        normalizer.mean.data.normal_(0, 0.1)
        normalizer.std.data.uniform_(0.5, 1.5)
    _stir(unet, seed)
    linear = {**LINEAR, "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    pipe = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        image_encoder=eye,
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler.from_config(linear),
        tokenizer=_tokenizer(),
        text_encoder=text,
        unet=unet,
        scheduler=DDIMScheduler.from_config(LINEAR),
        vae=vae,
    )
    with quiet():
        pipe.save_pretrained(folder, safe_serialization=True)
    return pipe


def kandinsky_folder(folder: Path, seed: int = 0) -> Any:
    """Write a random Kandinsky-2.2 decoder with its image encoder; the diffusers pipeline."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            norm_num_groups=8,
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            attention_head_dim=4,
            encoder_hid_dim=24,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            resnet_time_scale_shift="scale_shift",
        )
        movq = VQModel(
            block_out_channels=(32, 32),
            latent_channels=4,
            num_vq_embeddings=16,
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            vq_embed_dim=4,
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_type="spatial",
        )
        encoder = _vision_encoder()
    _stir(unet, seed)
    linear = {**LINEAR, "_class_name": "DDPMScheduler", "beta_schedule": "linear"}
    pipe = KandinskyV22Pipeline(unet=unet, scheduler=DDPMScheduler.from_config(linear), movq=movq)
    pipe.save_pretrained(folder, safe_serialization=True)
    with quiet():
        encoder.save_pretrained(folder / "image_encoder")
    return pipe


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )


def _text_encoder() -> Any:
    """A random CLIP text encoder of 32 numbers a token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            projection_dim=24,
            bos_token_id=98,
            eos_token_id=99,
            pad_token_id=99,
        )
    )


def _vision_encoder() -> Any:
    """A random CLIP image encoder to 24 numbers."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=24,
        )
    )


def _autoencoder() -> Any:
    """A random KL autoencoder, 16 px to 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _stir(model: nn.Module, seed: int) -> None:
    """Fill what libraries start at zero or one, which would hide mistakes."""
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(
                    (1.0 if "norm" in name and name.endswith("weight") else 0.0)
                    + 0.1 * torch.randn(p.shape, generator=random)
                )


def _tokenizer() -> Any:
    """A CLIPTokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 80)]
    words = [*letters, *(f"{c}</w>" for c in letters)]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = 98, 99
    return CLIPTokenizer(
        vocab=vocab,
        merges=[],
        model_max_length=20,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
