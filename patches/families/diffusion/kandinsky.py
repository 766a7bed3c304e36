"""Kandinsky-2.2-class decoders (unCLIP): a UNet told a CLIP image embedding alone, latents of a MoVQ autoencoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patches.families.diffusion.base import Condition, Pipe
from patches.families.diffusion.layout import component, config, schedule
from registry.errors import Invalid, NotFound

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Kandinsky(Pipe):
    """An image embedding (k,), not normalised, as the encoder gives it."""

    def __init__(self, unet: Any, movq: Any, encoder: Any, schedule_: Any, look: dict[str, Any] | None = None) -> None:
        """look: the encoder's preprocessing {"size", "mean", "std"}; default CLIP's own at the encoder's size."""
        super().__init__()
        self.denoiser, self.movq, self.encoder = unet, movq, encoder
        self.given = nn.ModuleDict({"image": nn.Identity()})
        self.schedule = schedule_
        self.factor = 2 ** (len(movq.config.block_out_channels) - 1)
        side = int(unet.config.sample_size)
        self.shape = (int(unet.config.in_channels), side, side)
        self.size = (side * self.factor, side * self.factor)
        self.conditions = {"image": (int(unet.config.encoder_hid_dim),)}
        self.look = look or {"size": int(encoder.config.image_size), "mean": MEAN, "std": STD}
        self.about = {
            "pipeline": "kandinsky",
            "unet": config(unet),
            "movq": config(movq),
            "encoder": [encoder.config.hidden_act, encoder.config.num_attention_heads],
            "look": {k: list(v) if isinstance(v, tuple) else v for k, v in self.look.items()},
        }
        self._null: Condition | None = None

    def forward(self, *, sample: Tensor, timestep: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        """(B, c, h, w) of latents (B, c, h, w), levels (B,) and image embeddings (B, k); a learned variance is cut
        off."""
        told = {"image_embeds": self.given["image"](image)}
        out: Tensor = self.denoiser(sample, timestep, None, added_cond_kwargs=told, return_dict=False)[0]
        return out[:, : self.shape[0]]

    def text(self, prompts: Sequence[str]) -> list[Condition]:
        raise Invalid("This decoder is told an image embedding; send a picture as its condition, not words.")

    @torch.no_grad()
    def image(self, pictures: Tensor) -> list[Condition]:
        size = int(self.look["size"])
        scale = size / min(pictures.shape[-2:])
        wide = [round(n * scale) for n in pictures.shape[-2:]]
        x = F.interpolate(pictures, size=wide, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (wide[0] - size) // 2, (wide[1] - size) // 2
        x = x[..., top : top + size, left : left + size]
        mean, std = (torch.tensor(self.look[k])[:, None, None] for k in ("mean", "std"))
        x = ((x - mean.to(x)) / std.to(x)).to(self.encoder.device, self.encoder.dtype)
        return [{"image": e} for e in self.encoder(x).image_embeds.float().cpu()]

    @torch.no_grad()
    def null(self) -> Condition:
        """The embedding of an all-zero input, as the pipeline's prior takes it."""
        if self._null is None:
            size = int(self.look["size"])
            zero = torch.zeros(1, 3, size, size, device=self.encoder.device, dtype=self.encoder.dtype)
            self._null = {"image": self.encoder(zero).image_embeds[0].float().cpu()}
        return self._null

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        made: Tensor = self.movq.encode((2 * pictures - 1).to(self.movq.device, self.movq.dtype)).latents
        return made.float()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        made: Tensor = self.movq.decode(latents.to(self.movq.device, self.movq.dtype), force_not_quantize=True).sample
        return (made.float() / 2 + 0.5).clamp(0, 1)

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        if any(n < self.factor or n % self.factor for n in size):
            raise Invalid(f"Pictures of this model have sides in steps of {self.factor}, not {size[1]} x {size[0]}.")
        return self.shape[0], size[0] // self.factor, size[1] // self.factor


def read(folder: Path, encoder: Path | None = None) -> Kandinsky:
    """The decoder in a folder of KandinskyV22Pipeline's layout.

    encoder: folder with `image_encoder/` (and `image_processor/`) of the prior; default the decoder's own folder, or
    one beside it whose name says prior instead of decoder.
    """
    from diffusers import UNet2DConditionModel, VQModel
    from transformers import CLIPVisionModelWithProjection

    beside = folder.with_name(folder.name.replace("decoder", "prior"))
    place = next((p for p in (encoder, folder, beside) if p is not None and (p / "image_encoder").is_dir()), None)
    if place is None:
        raise NotFound(f"{folder} has no image_encoder. Copy image_encoder/ and image_processor/ of the prior into it.")
    file, look = place / "image_processor" / "preprocessor_config.json", None
    if file.is_file():
        about = json.loads(file.read_text())
        size = about.get("crop_size", about.get("size"))
        size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
        look = {"size": int(str(size)), "mean": tuple(about["image_mean"]), "std": tuple(about["image_std"])}
    return Kandinsky(
        component(UNet2DConditionModel, folder / "unet"),
        component(VQModel, folder / "movq"),
        component(CLIPVisionModelWithProjection, place / "image_encoder"),
        schedule(folder),
        look,
    )
