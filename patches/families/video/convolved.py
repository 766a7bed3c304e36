"""Tokenizers that others trained, by folder: a frame becomes codes by convolutions, as by the paper's dVAE.

A folder's `config.json` says which of two it is: diffusers' VQModel (a VQ-VAE or a VQGAN, arXiv 2012.09841), which
encodes and paints; or transformers' `flava_image_codebook`, the encoder of DALL-E's dVAE (arXiv 2102.12092), whose
decoder transformers lacks: it encodes alone, so that no rollout can be shown.

Every frame is tokenised by itself. Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from registry.errors import BadArtifact, Invalid, NotFound

CONFIG, VQ_WEIGHTS, DVAE_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"
VQ, DVAE = "VQModel", "flava_image_codebook"
AT_ONCE = 64
"""Frames of one forward"""


class Convolved(nn.Module):
    """Frames <-> codes by a convolutional encoder, a codebook and, of a VQModel, a decoder; frozen."""

    none: Tensor

    def __init__(self, net: Any) -> None:
        """net: diffusers' VQModel or transformers' FlavaImageCodebook."""
        super().__init__()
        self.net: Any = net.eval().requires_grad_(False)
        self.paints = type(net).__name__ == VQ
        """Whether codes become pictures again"""
        # a dVAE's codes have no place of their own: its decoder reads one-hot vectors
        self.register_buffer("none", torch.zeros(0 if self.paints else self.net.config.vocab_size, 1), persistent=False)

    @property
    def codes(self) -> Tensor:
        """(V, d) centres, in the space that the decoder reads; zeros (V, 1) where there is no decoder."""
        found: Tensor = self.net.quantize.embedding.weight if self.paints else self.none
        return found

    @property
    def cell(self) -> int:
        """Pixels of a frame that one token stands for, along a side."""
        halvings = len(self.net.config.block_out_channels) - 1 if self.paints else self.net.config.num_groups - 1
        return int(2**halvings)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Bytes (b, T, 3, R, R) -> codes (b, T, n) int64 below V in raster order. Raises Invalid unless R is a multiple
        of `cell`."""
        if clips.shape[-1] % self.cell:
            raise Invalid(
                f"Frames of {clips.shape[-1]} px do not divide into this tokenizer's cells of {self.cell} px."
            )
        parts = clips.flatten(0, 1).to(self.codes.device).split(AT_ONCE)
        return torch.cat([self._near(part.float() / 255) for part in parts]).view(*clips.shape[:2], -1)

    def _near(self, x: Tensor) -> Tensor:
        """(m, n) codes of frames (m, 3, R, R) in [0, 1]."""
        if self.paints:
            _, _, (_, _, near) = self.net.quantize(self.net.encode(2 * x - 1).latents)
        else:
            near = self.net.get_codebook_indices(0.8 * x + 0.1)  # DALL-E's map of pixels into the logit-Laplace's range
        return torch.as_tensor(near).reshape(len(x), -1)

    def decode(self, codes: Tensor, size: int, before: Tensor | None = None) -> Tensor:
        """Codes (b, T, n) -> frames (b, T, 3, size, size) in [0, 1]. Raises Invalid if it cannot paint."""
        return self.paint(self.codes[codes], size, before)

    @torch.no_grad()
    def paint(self, vectors: Tensor, size: int, before: Tensor | None = None) -> Tensor:
        """The same for vectors (b, T, n, d) that need be no centres. before: not used, frames stand for themselves."""
        del before
        if not self.paints:
            raise Invalid("This tokenizer has no decoder, so its codes cannot be painted. Take a VQModel for rollouts.")
        side = size // self.cell
        h = vectors.flatten(0, 1).transpose(1, 2).reshape(-1, vectors.shape[-1], side, side)
        spatial = self.net.config.norm_type == "spatial"
        made = [self.net.decoder(self.net.post_quant_conv(p), p if spatial else None) for p in h.split(AT_ONCE)]
        return ((torch.cat(made) + 1) / 2).clamp(0, 1).view(*vectors.shape[:2], 3, size, size)


def read(folder: Path) -> Convolved:
    """The tokenizer in a folder, float32. Raises NotFound if there is none, BadArtifact naming what is wrong."""
    file = folder / CONFIG
    if not file.is_file():
        raise NotFound(f"{folder} has no {CONFIG}. Name the folder of a {VQ} (diffusers) or a {DVAE} (transformers).")
    try:
        about = json.loads(file.read_bytes())
        kind = about.get("_class_name") or about.get("model_type")
    except (ValueError, AttributeError) as e:
        raise BadArtifact(f"{file} cannot be read: {str(e)[:120]}.") from None
    if kind not in (VQ, DVAE):
        raise BadArtifact(f"{file}: {str(kind)[:40]!r} is no tokenizer that is read here: {VQ} or {DVAE}.")
    weights = folder / (VQ_WEIGHTS if kind == VQ else DVAE_WEIGHTS)
    if not weights.is_file():
        raise BadArtifact(
            f"{folder} has no {weights.name}. Pickles are not read: save it with safe_serialization=True."
        )
    try:
        net = _net(kind, about)
        net.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    except (SafetensorError, RuntimeError, TypeError, ValueError) as e:
        raise BadArtifact(f"{weights} does not fit {CONFIG}: {' '.join(str(e).split())[:160]}.") from None
    return Convolved(net)


def _net(kind: str, about: dict[str, Any]) -> nn.Module:
    if kind == VQ:
        from diffusers import VQModel

        made: nn.Module = VQModel.from_config(about)
        return made
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    return FlavaImageCodebook(FlavaImageCodebookConfig.from_dict(about))


def save(tokenizer: Convolved, folder: Path) -> None:
    """Write a tokenizer in the layout `read` takes, always in float32: which code is nearest is a fine matter."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.paints:
        about = {k: v for k, v in dict(tokenizer.net.config).items() if not k.startswith("_")} | {"_class_name": VQ}
    else:
        about = {**json.loads(tokenizer.net.config.to_json_string(use_diff=False)), "model_type": DVAE}
        about = {k: v for k, v in about.items() if k not in ("transformers_version", "_name_or_path")}
    (folder / CONFIG).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    held = {k: v.detach().cpu().float().contiguous() for k, v in tokenizer.net.state_dict().items()}
    save_file(held, folder / (VQ_WEIGHTS if tokenizer.paints else DVAE_WEIGHTS), metadata={"format": "pt"})
