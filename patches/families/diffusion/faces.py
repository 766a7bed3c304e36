"""The parts of `lab:faces`: words, a linear latent with a convolutional decoder, and a transformer that denoises it.

The transformer has the forward of diffusers' denoisers, (sample, timestep, encoder_hidden_states) -> .sample, and their
names (attn1, attn2, to_q, to_k, to_v, to_out), so that adapters made on it are loaded by diffusers and peft themselves.
Shapes: n rows, 8 x 3 x 3 latents = 9 tokens of 8 numbers, D width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from patches.families.diffusion.base import INDEX, Condition, Pipe
from patches.families.diffusion.schedule import Schedule
from registry.errors import BadArtifact, Invalid, NotFound

CHANNELS, SIDE, PIXELS = 8, 3, 64
WEIGHTS = "faces.safetensors"
WORDS = ("neutral", "smiling", "open", "blue", "yellow", "green", "white", "violet")
"""what a prompt can say of the mouth (first three) and of the background"""
LOOKS = ("beard", "glasses", "hat", "long hair", "bald")
"""what a prompt can say of the person: with, or without"""
SLOTS = 4
"""tokens of a prompt: person, mouth, background, looks"""
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True,
    "steps_offset": 0,
}  # fmt: skip


@dataclass
class Output:
    """What diffusers' models answer with."""

    sample: Tensor


class Words:
    """Prompts -> ids (n, 8): person, mouth, background, then beard, glasses, hat, long hair, bald; 0 is unsaid.

    A look is 1 if the prompt denies it ("no beard", "without glasses") and 2 if it says it. Words that this base never
    saw say nothing, as in any text encoder.
    """

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._ids(p) for p in prompts])

    @staticmethod
    def _ids(prompt: str) -> list[int]:
        words = re.findall(
            r"[a-z]+", prompt.lower().replace("long hair", "longhair").replace("long-haired", "longhair")
        )
        looks = [x.replace(" ", "") for x in LOOKS]
        out, no = [int(bool(words)), *[0] * (2 + len(LOOKS))], False
        for word in words:
            if word in ("no", "not", "without"):
                no = True
                continue
            word = word if word in looks or word in WORDS else word.removesuffix("ed")
            if word in looks:
                out[3 + looks.index(word)], no = (1 if no else 2), False
            elif word in WORDS:
                k = WORDS.index(word)
                out[1 if k < 3 else 2] = k + 1 if k < 3 else k - 2
        return out


class FaceWords(ModelMixin, ConfigMixin):
    """Embed prompts' ids (n, 8) as the four tokens (n, 4, width) that the transformer reads."""

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (2, 4, 6)
        self.words = nn.ModuleList(nn.Embedding(k, width) for k in sizes)
        self.looks = nn.ModuleList(nn.Embedding(3, width) for _ in LOOKS)

    def forward(self, ids: Tensor) -> Tensor:
        head = [word(ids[:, i]) for i, word in enumerate(self.words)]
        looks = torch.stack([look(ids[:, 3 + i]) for i, look in enumerate(self.looks)]).sum(0)
        return torch.stack([*head, looks], 1)


class FaceLatents(ModelMixin, ConfigMixin):
    """A linear encoder (principal components of 32 px pictures, partly whitened) and a convolutional decoder to 64 px.

    Pictures are (n, 3, 64, 64) in [-1, 1] as diffusers' autoencoders have them.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self, channels: int = CHANNELS, side: int = SIDE, width: int = 64, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        d = channels * side * side
        self.register_buffer("mean", torch.zeros(3 * 32 * 32))
        self.register_buffer("basis", torch.zeros(3 * 32 * 32, d))
        self.register_buffer("scale", torch.ones(d))
        w = (width, width * 3 // 4, width // 2, width // 4)
        self.enter = nn.Linear(d, w[0] * 16)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 4 * o, 3, padding=1), nn.PixelShuffle(2), nn.SiLU()) for i, o in pairwise(w)
        )
        self.leave = nn.Conv2d(w[-1], 12, 3, padding=1)

    def numbers(self, image: Tensor) -> Tensor:
        """(n, 72) latents of pictures, flat."""
        small = F.avg_pool2d(image, image.shape[-1] // 32).flatten(1)
        return (small - self.mean) @ self.basis / self.scale

    def encode(self, image: Tensor) -> Tensor:
        return self.numbers(image).unflatten(1, (self.config.channels, self.config.side, self.config.side))

    def decode(self, latents: Tensor) -> Tensor:
        x = F.silu(self.enter(latents.flatten(1))).unflatten(1, (-1, 4, 4))
        for up in self.ups:
            x = up(x)
        return F.pixel_shuffle(self.leave(x), 2)


class _Attention(nn.Module):
    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            p.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for p in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = _Attention(width, width, heads), _Attention(width, source, heads)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))
        self.time = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)
        with torch.no_grad():
            self.time.bias.view(9, width)[[2, 5, 8]] = 1.0  # gates start open

    def forward(self, x: Tensor, time: Tensor, source: Tensor) -> Tensor:
        m = self.time(time)[:, None].chunk(9, 2)

        def norm(i: int) -> Tensor:
            return F.layer_norm(x, x.shape[-1:]) * (1 + m[i]) + m[i + 1]

        y = norm(0)
        x = x + m[2] * self.attn1(y, y)
        x = x + m[5] * self.attn2(norm(3), source)
        return x + m[8] * self.ff(norm(6))


class FaceTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """v(sample, timestep, encoder_hidden_states) with self- and cross-attention and times in adaptive layer norms.

    The latents are uncorrelated with known variances, so the best *linear* denoiser is known in closed form; it is a
    fixed skip and the network learns what is not Gaussian.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self, in_channels: int = CHANNELS, sample_size: int = SIDE, width: int = 64, depth: int = 4, heads: int = 2,
        cross_attention_dim: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.enter, self.leave = nn.Linear(in_channels, width), nn.Linear(width, in_channels)
        self.place = nn.Parameter(torch.randn(sample_size * sample_size, width) * 0.3)
        self.clock = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width, cross_attention_dim, heads) for _ in range(depth))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("variance", torch.ones(in_channels, sample_size, sample_size))
        self.register_buffer("levels", levels(), persistent=False)

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **_: Any
    ) -> Any:
        """sample (n, 8, 3, 3), timestep () or (n,) in 0 ... 999, encoder_hidden_states (n, 4, 64) -> v like sample."""
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample)).long()
        half = self.config.width // 2
        f = torch.exp(torch.linspace(0, 6.9078, half, device=sample.device, dtype=sample.dtype))
        angle = f * ((t[:, None].to(sample.dtype) + 1) / 1000)
        time = self.clock(torch.cat([angle.sin(), angle.cos()], 1))
        h = self.enter(sample.flatten(2).transpose(1, 2)) + self.place  # (n, 9, D)
        for block in self.blocks:
            h = block(h, time, encoder_hidden_states)
        kept = self.levels[t].to(sample.dtype)[:, None, None, None]
        k = self.variance.to(sample.dtype)
        linear = (kept * (1 - kept)).sqrt() * (1 - k) / (kept * k + 1 - kept) * sample
        v = linear + self.leave(F.layer_norm(h, h.shape[-1:])).transpose(1, 2).reshape_as(sample)
        return Output(v) if return_dict else (v,)


def levels(steps: int = 1000) -> Tensor:
    """(steps,) share of signal variance kept at each timestep: the cosine schedule that SCHEDULER names."""
    return Schedule(SCHEDULER).alphas[:steps].clone()


class Faces(Pipe):
    """`lab:faces` as the family sees it: condition `text` (4, 64), the embedded words of a prompt."""

    def __init__(self, denoiser: FaceTransformer, words: FaceWords, autoencoder: FaceLatents) -> None:
        super().__init__()
        self.denoiser, self.words, self.autoencoder = denoiser, words, autoencoder
        self.given = nn.ModuleDict({"text": nn.Identity()})
        self.schedule = Schedule(SCHEDULER)
        c = denoiser.config
        self.shape, self.size = (c.in_channels, c.sample_size, c.sample_size), (PIXELS, PIXELS)
        self.conditions = {"text": (SLOTS, words.config.width)}
        self.about = {"class": "LabFaces", "words": [*WORDS, *LOOKS]}

    def forward(self, *, sample: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        out: Tensor = self.denoiser(sample, timestep, self.given["text"](condition["text"])).sample
        return out

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """(n, 4, 64) of prompts as ids (n, 8)."""
        out: Tensor = self.words(ids.to(self.autoencoder.mean.device))
        return out

    def text(self, prompts: Sequence[str]) -> list[Condition]:
        return [{"text": row.cpu()} for row in self.embed(Words()(prompts))]

    def image(self, pictures: Tensor) -> list[Condition]:
        raise Invalid("lab:faces reads words, not pictures; to draw one person again, invert a picture (w2w).")

    def null(self) -> Condition:
        return self.text([""])[0]

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        net = self.autoencoder
        return net.encode(pictures.to(net.mean) * 2 - 1)

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        net = self.autoencoder
        return (net.decode(latents.to(net.mean)) / 2 + 0.5).clamp(0, 1)


def read(folder: Path) -> Faces:
    """The model in a folder that training/lab/face_diffusion.py wrote. Raises NotFound or BadArtifact."""
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        raise NotFound(f"{folder} has no {WEIGHTS}. Make it: python -m training.lab.face_diffusion lab {folder}")
    about = json.loads((folder / INDEX).read_text())
    tensors = {k: v.float() for k, v in load_file(file).items()}
    pipe = Faces(FaceTransformer(**about["transformer"]), FaceWords(**about["words"]), FaceLatents(**about["latents"]))
    for name, part in (("transformer", pipe.denoiser), ("words", pipe.words), ("latents", pipe.autoencoder)):
        _fill(part, {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}, file)
    return pipe


def _fill(part: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        part.load_state_dict(dict(tensors))
    except RuntimeError as e:
        raise BadArtifact(f"{file} does not hold {type(part).__name__}: {str(e)[:200]}") from None


def tiny(seed: int = 0) -> Faces:
    """A random one with a latent that is not empty: for tests."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = Faces(FaceTransformer(width=32, depth=2, cross_attention_dim=32), FaceWords(32), FaceLatents(width=16))
        net: Any = pipe.denoiser
        nn.init.normal_(net.leave.weight, std=0.2)
        for block in net.blocks:
            nn.init.normal_(block.time.weight, std=0.05)
        pipe.autoencoder.basis.copy_(torch.linalg.qr(torch.randn_like(pipe.autoencoder.basis)).Q)
    return pipe
