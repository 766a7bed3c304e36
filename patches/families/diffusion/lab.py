"""lab:diffusion: a small UNet over 64 px drawings, told text states and an image embedding of the lab's CLIP.

The net sees pixel_unshuffle(2 * picture - 1, 2), 12 channels at 32 x 32. Its context is 32 text states (after the
text tower's last LayerNorm) and 4 tokens that a projection makes of 16 times the unit image embedding (the layout of
IP-Adapter, arXiv 2308.06721).

The text states are those of the CLIP it was trained with, in which the token embeddings of the start and end marks
are zero. In `lab:clip` as it ships these two rows were fitted again, and with them the pictures are wrong (1 of 3
prompts is drawn instead of 9 of 10). So the folder records the encoder's digest and the rows to be zeroed, holds
golden states, and refuses another encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patches.families.base import Base, load_base
from patches.families.diffusion.base import INDEX, Condition, Pipe
from patches.families.diffusion.layout import config, schedule
from patches.families.diffusion.packed import load_packed
from patches.families.diffusion.schedule import Schedule
from registry.errors import BadArtifact, WrongBase

SCALE = 16.0
"""what the unit image embedding is multiplied by before its projection"""
GOLDEN = "golden.safetensors"
GOLDEN_TOLERANCE = 2e-3
"""largest difference of a text state, float32 on a CPU"""


class LabDiffusion(Pipe):
    """Text states (T, D) and a unit image embedding (k,), either of which may be nothing."""

    def __init__(
        self, unet: Any, projection: nn.Module, clip: Any, tokenizer: Any, schedule_: Schedule, about: Any
    ) -> None:
        """clip: an open_clip CLIP whose states the UNet was trained on; tokenizer(texts) -> ids (B, T)."""
        super().__init__()
        self.denoiser, self.projection, self.clip = unet, projection, clip
        self.given = nn.ModuleDict({"text": nn.Identity(), "image": nn.Identity()})
        self.tokenizer, self.schedule = tokenizer, schedule_
        side = int(unet.config.sample_size)
        self.shape, self.size = (int(unet.config.in_channels), side, side), (2 * side, 2 * side)
        width, joint = clip.ln_final.weight.shape[0], clip.visual.proj.shape[1]
        self.conditions = {"text": (clip.positional_embedding.shape[0], width), "image": (joint,)}
        self.about = {"pipeline": "lab", "unet": config(unet), **about}
        self._null: Tensor | None = None

    def forward(self, *, sample: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        """(B, 12, h, w) of unshuffled pictures, levels (B,), text states (B, T, D) and image embeddings (B, k)."""
        context = torch.cat([self.given["text"](text), self.projection(SCALE * self.given["image"](image))], 1)
        x = sample.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.denoiser(x, timestep, context, return_dict=False)[0]
        return out

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> Tensor:
        """(B, T, D) text states after the last LayerNorm."""
        m = self.clip
        ids = self.tokenizer(list(prompts)).to(m.positional_embedding.device)
        x = m.token_embedding(ids) + m.positional_embedding
        made: Tensor = m.ln_final(m.transformer(x, attn_mask=m.attn_mask.to(x.dtype)))
        return made.float().cpu()

    @torch.no_grad()
    def embeddings(self, pictures: Tensor) -> Tensor:
        """(B, k) unit image embeddings of pictures (B, 3, H, W) in 0..1."""
        m = self.clip
        x = F.interpolate(pictures, size=m.visual.image_size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.about["mean"], self.about["std"]))
        x = ((x - mean) / std).to(m.positional_embedding)
        return F.normalize(m.visual(x).float(), dim=-1).cpu()

    def text(self, prompts: Sequence[str]) -> list[Condition]:
        nothing = torch.zeros(self.conditions["image"])
        return [{"text": s, "image": nothing} for s in self.states(prompts)]

    def image(self, pictures: Tensor) -> list[Condition]:
        nothing = self.null()["text"]
        return [{"text": nothing, "image": e} for e in self.embeddings(pictures)]

    def null(self) -> Condition:
        if self._null is None:
            self._null = self.states([""])[0]
        return {"text": self._null, "image": torch.zeros(self.conditions["image"])}

    def latents(self, pictures: Tensor) -> Tensor:
        return F.pixel_unshuffle(2 * pictures.float() - 1, 2)

    def pictures(self, latents: Tensor) -> Tensor:
        return (F.pixel_shuffle(latents.float(), 2) / 2 + 0.5).clamp(0, 1)


def build(
    unet: Any, projection: nn.Module, encoder: Base, schedule_: Schedule, zero_rows: Sequence[int]
) -> LabDiffusion:
    """The Pipe over an encoder, whose token embeddings `zero_rows` are set to zero. The encoder is used up."""
    with torch.no_grad():
        encoder.model.token_embedding.weight[list(zero_rows)] = 0.0
    p = encoder.processor
    about = {"encoder": encoder.digest, "zero_rows": list(zero_rows), "mean": list(p.mean), "std": list(p.std)}
    return LabDiffusion(unet, projection, encoder.model, p.tokenizer, schedule_, about)


def read(folder: Path) -> LabDiffusion:
    """The model in a folder. Raises WrongBase for another encoder than it was trained with, BadArtifact for other
    states."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.embeddings import ImageProjection

    index = json.loads((folder / INDEX).read_text())
    told = index["encoder"]
    encoder = load_base(told["ref"], "clip")
    check_encoder(encoder, told["digest"])
    unet: Any = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    unet.load_state_dict(load_packed(folder / "unet"))
    about = json.loads((folder / "image_proj" / "config.json").read_text())
    projection: Any = ImageProjection(**{k: v for k, v in about.items() if k != "_class_name"})
    projection.load_state_dict(load_packed(folder / "image_proj"))
    pipe = build(unet, projection, encoder, schedule(folder), told["zero_rows"])
    pipe.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pipe.eval()
    _check_golden(pipe, folder)
    return pipe


def check_encoder(encoder: Base, digest: str) -> None:
    """Raises WrongBase if `encoder` is not the one the denoiser was trained with."""
    if encoder.digest != digest:
        raise WrongBase(
            f"This diffusion model was trained on text states of the CLIP {digest[:16]}, and {encoder.ref} is "
            f"{encoder.digest[:16]}. Another encoder's states draw other things; put the right one back."
        )


def golden(pipe: LabDiffusion, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What `_check_golden` compares: the text states of prompts."""
    return {"states": pipe.states(prompts)}


def _check_golden(pipe: LabDiffusion, folder: Path) -> None:
    from safetensors import safe_open

    if not (folder / GOLDEN).is_file():
        return
    with safe_open(folder / GOLDEN, "pt") as f:
        want, prompts = f.get_tensor("states").float(), json.loads((f.metadata() or {})["prompts"])
    off = float((golden(pipe, prompts)["states"] - want).abs().max())
    if not off <= GOLDEN_TOLERANCE:
        raise BadArtifact(
            f"{folder.name}: text states differ by {off:.1e} from those it was trained on; weights, tokenizer or the "
            "zeroed rows of its encoder are not the right ones."
        )
