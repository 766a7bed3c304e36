"""Stable-Diffusion-1.x/2.x-class pipelines: a UNet that attends to the states of a text encoder, latents of a KL
autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.families.diffusion.base import Condition, Pipe
from patches.families.diffusion.layout import component, config, schedule
from registry.errors import Invalid


class Stable(Pipe):
    """Text states (T, D) through cross-attention."""

    def __init__(self, unet: Any, vae: Any, encoder: Any, tokenizer: Any, schedule_: Any) -> None:
        super().__init__()
        self.denoiser, self.vae, self.encoder = unet, vae, encoder
        self.given = nn.ModuleDict({"text": nn.Identity()})
        self.tokenizer, self.schedule = tokenizer, schedule_
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = int(unet.config.sample_size)
        self.shape = (int(unet.config.in_channels), side, side)
        self.size = (side * self.factor, side * self.factor)
        self.length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
        self.conditions = {"text": (self.length, int(encoder.config.hidden_size))}
        self.about = {
            "pipeline": "stable",
            "unet": config(unet),
            "vae": config(vae),
            "text": [encoder.config.hidden_act, encoder.config.num_attention_heads],
            "tokens": tokenizer("a photo of 3 cats")["input_ids"],
        }

    def forward(self, *, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """(B, c, h, w) of latents (B, c, h, w), levels (B,) and text states (B, T, D)."""
        out: Tensor = self.denoiser(sample, timestep, self.given["text"](text), return_dict=False)[0]
        return out

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> list[Condition]:
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )["input_ids"]
        states = self.encoder(ids.to(self.encoder.device))[0].float().cpu()
        return [{"text": s} for s in states]

    def image(self, pictures: Tensor) -> list[Condition]:
        raise Invalid("This model is asked in words; it reads no picture as its condition.")

    def null(self) -> Condition:
        return self.text([""])[0]

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        x = (2 * pictures - 1).to(self.vae.device, self.vae.dtype)
        made: Tensor = self.vae.encode(x).latent_dist.mode() * self.vae.config.scaling_factor
        return made.float()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        x = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        made: Tensor = self.vae.decode(x, return_dict=False)[0]
        return (made.float() / 2 + 0.5).clamp(0, 1)

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        if any(n < self.factor or n % self.factor for n in size):
            raise Invalid(f"Pictures of this model have sides in steps of {self.factor}, not {size[1]} x {size[0]}.")
        return self.shape[0], size[0] // self.factor, size[1] // self.factor


def parts(folder: Path) -> tuple[Any, Any, Any, Any, Any]:
    """UNet, autoencoder, text encoder, tokenizer and schedule of a folder of Stable Diffusion's layout."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    return (
        component(UNet2DConditionModel, folder / "unet"),
        component(AutoencoderKL, folder / "vae"),
        component(CLIPTextModel, folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        schedule(folder),
    )


def read(folder: Path) -> Stable:
    """The pipeline in a folder of StableDiffusionPipeline's layout; its safety checker is not read."""
    return Stable(*parts(folder))
