"""Stable-unCLIP-class pipelines: Stable Diffusion told text through cross-attention and a CLIP image embedding as its
class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.families.diffusion import vision
from patches.families.diffusion.base import Condition
from patches.families.diffusion.layout import component, config, schedule
from patches.families.diffusion.schedule import Schedule
from patches.families.diffusion.stable import Stable, parts


class StableUnclip(Stable):
    """Text states (T, D) and an image embedding (k,), not normalised; zeros are no picture.

    An edit of `given.image` comes before the pipeline's normaliser and its noise level, which is 0 here and without
    the noise itself: the shrinking of level 0 and its sinusoid stay, so what is told is what was trained.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        encoder: Any,
        tokenizer: Any,
        schedule_: Any,
        eye: Any,
        normalizer: Any,
        noising: Schedule,
        look: vision.Look,
    ) -> None:
        """eye: the image encoder; normalizer: mean and std (1, k); noising: the schedule of the embedding's noise."""
        super().__init__(unet, vae, encoder, tokenizer, schedule_)
        self.given["image"] = nn.Identity()
        self.eye, self.normalizer, self.look = eye, normalizer, look
        self.kept = float(noising.alphas[0].sqrt())
        width = int(normalizer.config.embedding_dim)
        self.conditions = {**self.conditions, "image": (width,)}
        self.about = {
            **self.about,
            "pipeline": "unclip",
            "eye": [eye.config.hidden_act, eye.config.num_attention_heads],
            "normalizer": config(normalizer),
            "noising": dict(noising.config),
            "look": vision.told(look),
        }

    def forward(self, *, sample: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        """(B, c, h, w) of latents (B, c, h, w), levels (B,), text states (B, T, D) and image embeddings (B, k)."""
        labels = self._labels(self.given["image"](image))
        states = self.given["text"](text)
        out: Tensor = self.denoiser(sample, timestep, states, class_labels=labels, return_dict=False)[0]
        return out

    def _labels(self, e: Tensor) -> Tensor:
        """(B, 2 k) the embedding as level 0 shrinks it towards the mean, and that level's sinusoid; zeros for none."""
        from diffusers.models.embeddings import get_timestep_embedding

        mean, std = self.normalizer.mean.to(e), self.normalizer.std.to(e)
        level = torch.zeros(len(e), device=e.device)
        wave = get_timestep_embedding(level, e.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0).to(e)
        shrunk = (e - mean) / std * self.kept * std + mean
        none = (e == 0).all(1, keepdim=True)
        return torch.cat([shrunk, wave], 1).masked_fill(none, 0.0)

    def text(self, prompts: Sequence[str]) -> list[Condition]:
        none = torch.zeros(self.conditions["image"])
        return [{**c, "image": none} for c in super().text(prompts)]

    def image(self, pictures: Tensor) -> list[Condition]:
        said = self.null()["text"]
        return [{"text": said, "image": e} for e in vision.embed(self.eye, self.look, pictures)]


def read(folder: Path) -> StableUnclip:
    """The pipeline in a folder of StableUnCLIPImg2ImgPipeline's layout; its safety checker is not read."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    eye = vision.read_encoder(folder / "image_encoder")
    return StableUnclip(
        *parts(folder),
        eye,
        component(StableUnCLIPImageNormalizer, folder / "image_normalizer"),
        schedule(folder, "image_noising_scheduler"),
        vision.look_of(eye, folder / "feature_extractor" / "preprocessor_config.json"),
    )
