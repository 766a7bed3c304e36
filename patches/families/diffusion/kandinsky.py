"""Kandinsky-2.2-class decoders (unCLIP): a UNet told a CLIP image embedding alone, latents of a MoVQ autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.families.diffusion import vision
from patches.families.diffusion.base import Condition, Pipe
from patches.families.diffusion.layout import component, config, schedule
from registry.errors import Invalid, NotFound


class Kandinsky(Pipe):
    """An image embedding (k,), not normalised, as the encoder gives it."""

    def __init__(self, unet: Any, movq: Any, encoder: Any, schedule_: Any, look: vision.Look) -> None:
        super().__init__()
        self.denoiser, self.movq, self.encoder = unet, movq, encoder
        self.given = nn.ModuleDict({"image": nn.Identity()})
        self.schedule = schedule_
        self.factor = 2 ** (len(movq.config.block_out_channels) - 1)
        side = int(unet.config.sample_size)
        self.shape = (int(unet.config.in_channels), side, side)
        self.size = (side * self.factor, side * self.factor)
        self.conditions = {"image": (int(unet.config.encoder_hid_dim),)}
        self.look = look
        self.about = {
            "pipeline": "kandinsky",
            "unet": config(unet),
            "movq": config(movq),
            "encoder": [encoder.config.hidden_act, encoder.config.num_attention_heads],
            "look": vision.told(look),
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

    def image(self, pictures: Tensor) -> list[Condition]:
        return [{"image": e} for e in vision.embed(self.encoder, self.look, pictures)]

    def null(self) -> Condition:
        """The embedding of an all-zero input, as the pipeline's prior takes it."""
        if self._null is None:
            self._null = {"image": vision.embed_nothing(self.encoder, self.look)}
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

    beside = folder.with_name(folder.name.replace("decoder", "prior"))
    place = next((p for p in (encoder, folder, beside) if p is not None and (p / "image_encoder").is_dir()), None)
    if place is None:
        raise NotFound(f"{folder} has no image_encoder. Copy image_encoder/ and image_processor/ of the prior into it.")
    eye = vision.read_encoder(place / "image_encoder")
    return Kandinsky(
        component(UNet2DConditionModel, folder / "unet"),
        component(VQModel, folder / "movq"),
        eye,
        schedule(folder),
        vision.look_of(eye, place / "image_processor" / "preprocessor_config.json"),
    )
