"""Diffusion models: what the worker, the patches and the fits need of one, and how a reference becomes one.

References: `lab:<name>` (ship here), `hf-hub:org/name@revision` and `local-dir:path` in diffusers' own folder layout
(`model_index.json` names the pipeline). Read are Stable-Diffusion-1.x/2.x-class (text through cross-attention),
Stable-unCLIP-class (text and an image embedding) and Kandinsky-2.2-class (unCLIP: an image embedding alone) pipelines;
only safetensors, and no code of the folder.

`base.model(sample=x, timestep=t, text=..., image=...)` is one evaluation of the denoiser: x (B, c, h, w) noisy
latents, t (B,) levels, and one tensor per name of `conditions`, batched. So `root` is the model itself and rows of a
batch may name arms. Every condition passes through `given.<name>`, which is where an edit of the conditioning sits.

Shapes: B rows, (c, h, w) latents, (3, H, W) pictures in 0..1.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.checkpoints import json_object
from patches.families.base import Base, check_device, hub_folder, slug
from patches.families.diffusion.schedule import Schedule
from registry import manifest
from registry.errors import Invalid, NotFound

SITES = {
    "text": "given.text",
    "image": "given.image",
    "denoiser": "denoiser",
}
"""canonical name -> module path. text (B, T, D) and image (B, k): a condition as it enters the denoiser; denoiser: what
adapters name their modules from"""
LAYOUTS = {
    "StableDiffusionPipeline": "patches.families.diffusion.stable",
    "StableUnCLIPImg2ImgPipeline": "patches.families.diffusion.unclip",
    "KandinskyV22Pipeline": "patches.families.diffusion.kandinsky",
    "LabDiffusion": "patches.families.diffusion.lab",
    "LabFaces": "patches.families.diffusion.faces",
}
"""pipeline class that `model_index.json` names -> the module whose `read(folder)` builds its Pipe"""
INDEX = "model_index.json"
HUB_FILES = (
    INDEX, "scheduler/*.json", "unet/config.json", "unet/*.safetensors", "vae/config.json", "vae/*.safetensors",
    "movq/config.json", "movq/*.safetensors", "text_encoder/config.json", "text_encoder/*.safetensors", "tokenizer/*",
    "image_encoder/config.json", "image_encoder/*.safetensors", "image_normalizer/config.json",
    "image_normalizer/*.safetensors", "image_noising_scheduler/*.json", "feature_extractor/*.json",
)  # fmt: skip
SHIPPED = Path(__file__).parents[2] / "lab"
Condition = Mapping[str, Tensor]
"""one row's conditions by name, without a batch dimension, as many as `Pipe.conditions` names"""


class Pipe(nn.Module, ABC):
    """A denoiser with its conditioning, its latent space and its schedule. Subclasses give the five methods."""

    denoiser: nn.Module
    """what adapters change; the UNet or transformer"""
    given: nn.ModuleDict
    """name of a condition -> the identity it passes through"""
    schedule: Schedule
    shape: tuple[int, int, int]
    """(c, h, w) of a latent at the model's own size"""
    size: tuple[int, int]
    """(H, W) of a picture at the model's own size"""
    conditions: Mapping[str, tuple[int, ...]]
    """name -> shape of one row's condition"""
    about: Mapping[str, Any]
    """what besides the weights shapes an output, JSON-able: goes into the digest"""

    @abstractmethod
    def forward(self, *, sample: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """The denoiser's output for (B, c, h, w) latents at (B,) levels, float as they are."""

    @abstractmethod
    def text(self, prompts: Sequence[str]) -> list[Condition]:
        """Conditions that ask for what the prompts say. Raises Invalid if this model reads no text."""

    @abstractmethod
    def image(self, pictures: Tensor) -> list[Condition]:
        """Conditions that ask for pictures like (B, 3, H, W) in 0..1. Raises Invalid if this model reads none."""

    @abstractmethod
    def null(self) -> Condition:
        """The condition that asks for nothing: the other half of guidance."""

    def latents(self, pictures: Tensor) -> Tensor:
        """(B, c, h, w) of pictures (B, 3, H, W) in 0..1."""
        raise NotImplementedError

    def pictures(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 of latents."""
        raise NotImplementedError

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) of latents for pictures of (H, W). Raises Invalid if this model makes another size only."""
        if tuple(size) != tuple(self.size):
            raise Invalid(f"This model makes pictures of {self.size[1]} x {self.size[0]}, not {size[1]} x {size[0]}.")
        return self.shape

    def rows(self, sample: Tensor, timestep: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """`forward` for rows with their own conditions; float32 in and out, the model's own dtype between."""
        kind = next(self.denoiser.parameters())
        stacked = {name: torch.stack([c[name] for c in conditions]).to(kind.device) for name in self.conditions}
        stacked = {name: x.to(kind.dtype) if x.is_floating_point() else x for name, x in stacked.items()}
        out: Tensor = self(sample=sample.to(kind.device, kind.dtype), timestep=timestep.to(kind.device), **stacked)
        return out.float()


@dataclass(frozen=True)
class Processor:
    """Pictures in and out."""

    size: tuple[int, int]

    def image(self, picture: Any) -> Tensor:
        """(3, H, W) in 0..1 of an RGB PIL image: cut to the model's aspect around the centre, then resized."""
        from PIL import Image, ImageOps
        from torchvision.transforms.functional import to_tensor

        height, width = self.size
        made: Tensor = to_tensor(ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
        return made

    def picture(self, x: Tensor) -> Any:
        """The PIL image of (3, H, W) in 0..1."""
        from PIL import Image

        return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def dtype_of(device: str) -> torch.dtype:
    """float32 on a CPU, where bfloat16 convolutions are six times slower; bfloat16 on CUDA."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load(ref: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Base:
    """The base `ref` names, in eval mode without gradients. Raises NotFound with what to put where."""
    check_device(device)
    folder, name = _folder(ref)
    base = wrap(ref, name, read(folder, _encoder(ref)))
    base.model.to(device=device, dtype=dtype or dtype_of(device))
    return base


def read(folder: Path, encoder: Path | None = None) -> Pipe:
    """The Pipe, in float32, in a folder of diffusers' layout. Raises NotFound for a layout that is not read.

    encoder: the folder with the encoder of the condition, for pipelines that keep it elsewhere.
    """
    file = folder / INDEX
    if not file.is_file():
        raise NotFound(f"{folder} has no {INDEX}. Give a folder that a diffusers pipeline's save_pretrained wrote.")
    try:
        kind = json.loads(file.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise NotFound(f"{file} is not the index of a diffusers pipeline.") from None
    if kind not in LAYOUTS:
        raise NotFound(f"{folder} holds a {str(kind)[:60]}; read are {', '.join(LAYOUTS)}.")
    pipe: Pipe = importlib.import_module(LAYOUTS[kind]).read(folder, *([encoder] if encoder else []))
    return pipe


def knows(folder: Path) -> str:
    """What a folder of diffusers' layout is, if its pipeline is read."""
    if not (folder / INDEX).is_file():
        return ""
    kind = json_object(folder / INDEX).get("_class_name")
    return f"a diffusion pipeline, {kind}" if kind in LAYOUTS else ""


def parts(ref: str) -> tuple[str, ...]:
    """References of the bases that the one `ref` names is made with: the encoder of its condition, if that is
    another's."""
    scheme, _, rest = ref.partition(":")
    file = SHIPPED / slug(rest) / INDEX
    if scheme != "lab" or not file.is_file():
        return ()
    encoder = json.loads(file.read_text()).get("encoder", {})
    return (encoder["ref"],) if "ref" in encoder else ()


def wrap(ref: str, name: str, pipe: Pipe) -> Base:
    """The Base of a Pipe, frozen, its digest over every weight and choice."""
    pipe.eval().requires_grad_(False)
    return Base(ref, name, digest(pipe), pipe, Processor(pipe.size), "")


def digest(pipe: Pipe) -> str:
    """64 hex digits over every weight as it was read (before a device's dtype), the schedule and `about`."""
    weights = {
        k: [str(v.dtype), list(v.shape), hashlib.sha256(v.detach().cpu().contiguous().numpy()).hexdigest()]
        for k, v in pipe.state_dict().items()
    }
    return manifest.digest_of({"weights": weights, "schedule": dict(pipe.schedule.config), "about": dict(pipe.about)})


def _folder(ref: str) -> tuple[Path, str]:
    """The folder `ref` names, and the base's name."""
    scheme, _, rest = ref.partition(":")
    if scheme == "lab" and (SHIPPED / slug(rest) / INDEX).is_file():
        return SHIPPED / slug(rest), f"lab-{slug(rest)}"
    if scheme == "local-dir":
        if not Path(rest).is_dir():
            raise NotFound(f"There is no folder {rest}. Give local-dir:path/to/folder.")
        return Path(rest), slug(Path(rest).resolve().name)
    if scheme == "hf-hub":
        return hub_folder(rest, HUB_FILES), slug(rest.partition("@")[0].rpartition("/")[2])
    raise NotFound(
        f"{ref[:80]!r} names no diffusion model. Write lab:diffusion, hf-hub:org/name@revision or local-dir:path."
    )


def _encoder(ref: str) -> Path | None:
    """Kandinsky keeps the image encoder of its condition in the repository of its prior."""
    scheme, _, rest = ref.partition(":")
    name = rest.partition("@")[0]
    if scheme != "hf-hub" or not name.endswith("-decoder"):
        return None
    return hub_folder(name.removesuffix("decoder") + "prior", ("image_encoder/*", "image_processor/*"))
