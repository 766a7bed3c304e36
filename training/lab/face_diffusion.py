"""Train `lab:faces`: a small latent diffusion transformer that draws the faces of training/lab/faces.py.

    python -m training.lab.face_diffusion tiny out/     # seconds: every step of the way, knows nothing
    python -m training.lab.face_diffusion lab out/      # the shipped one: about 6 CPU minutes on one core

Four fits: principal components as the latent, a convolutional decoder for it, a judge that reads attributes (on drawn
pictures alone), and the denoiser. Prompts say mouth and background, and sometimes what the person looks like; who it
is, no prompt can say. Writes the folder that `lab:faces` is: weights in fp16, card.json with what was measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from patches.families.diffusion.base import INDEX
from patches.families.diffusion.faces import LOOKS, SCHEDULER, WEIGHTS, FaceLatents, FaceTransformer, FaceWords
from registry import config as configs
from registry import manifest
from registry.config import STRICT
from training.lab import faces
from training.lab.faces import BINARY, GROUNDS, MOUTHS, Judge, Pictures, balanced, identities, pictures
from training.progress import tqdm


@dataclass(frozen=True)
class Config:
    """How many pictures are drawn and how long each part is trained."""

    __pydantic_config__ = STRICT

    seed: int = 0
    pictures: int = 60_000
    """drawn once, each of another person; every part is trained on them"""
    width: int = 64
    depth: int = 4
    heads: int = 2
    steps: int = 5000
    """Optimiser steps of the denoiser"""
    batch: int = 128
    lr: float = 3e-3
    whiten: float = 0.4
    """power of a component's standard deviation that is divided out: 1 would make all latents equally large"""
    decoder_steps: int = 900
    decoder_noise: float = 0.25
    """largest standard deviation of the noise the decoder is shown, so that imperfect samples are drawn sharply"""
    judge_steps: int = 1000
    said: float = 0.3
    """share of pictures whose prompt says each look, mouth and background are said in 70 %"""
    test_pictures: int = 1000


RECIPES: dict[str, Config] = {
    "tiny": Config(
        pictures=192, width=16, depth=1, heads=2, steps=4, batch=16, decoder_steps=2, judge_steps=4, test_pictures=32,
    ),
    "lab": Config(),
}  # fmt: skip


def ids(p: Pictures, g: Generator | None = None, said: float = 0.3) -> Tensor:
    """(n, 8) what prompts say of pictures; with a generator parts are left out at random, all of it in 10 %."""
    looks = p.people[:, : len(BINARY)].long() + 1
    out = torch.cat(
        [torch.ones(len(looks), 1, dtype=torch.long), p.mouth[:, None] + 1, p.ground[:, None] + 1, looks], 1
    )
    return out if g is None else forget(out, g, said)


def forget(ids: Tensor, g: Generator, said: float = 0.3) -> Tensor:
    """Prompts (n, 8) with mouth and background unsaid in 30 %, each look in 1 - said, everything in 10 %."""
    keep = torch.rand(ids.shape, generator=g)
    shares = torch.tensor([1.0, 0.7, 0.7, *[said] * len(LOOKS)])
    return ids * (keep < shares) * (torch.rand(len(ids), 1, generator=g) > 0.1)


def drawn(n: int, g: Generator) -> Pictures:
    """n pictures of n people with the images as bytes, a quarter of the memory."""
    parts = []
    for at in range(0, n, 2048):
        p = pictures(identities(min(2048, n - at), g), g)
        parts.append((bytes_of(p.image), p.people, p.mouth, p.ground))
    return Pictures(*(torch.cat(x) for x in zip(*parts, strict=True)))


def bytes_of(image: Tensor) -> Tensor:
    return (image * 255).round().byte()


def real(image: Tensor) -> Tensor:
    """Pictures in [0, 1] from bytes."""
    return image.float() / 255


# ---- the parts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def latents(image: Tensor, whiten: float) -> FaceLatents:
    """The linear latent of pictures (n, 3, 64, 64) in [0, 1]; its decoder is untrained."""
    out: FaceLatents = FaceLatents()
    d = len(out.scale)
    x = torch.cat([F.avg_pool2d(real(part) * 2 - 1, 2).flatten(1) for part in image[:20_000].split(1024)])
    mean = x.mean(0)
    _, s, v = torch.svd_lowrank(x.sub_(mean), q=d + 8, niter=2)
    sd = s[:d] / len(x) ** 0.5
    scale = sd**whiten
    # which component is which channel: neighbours in size share a token, so that tokens hold alike amounts of noise
    out.mean.copy_(mean)
    out.basis.copy_(v[:, :d])
    out.scale.copy_(scale * (sd / scale).square().mean().sqrt())
    return out


def train(
    parameters: list[nn.Parameter], loss: Callable[[Generator], Tensor], steps: int, lr: float, seed: int, what: str
) -> tuple[list[float], list[Tensor]]:
    """AdamW with warm-up and linear decay; the losses and an exponential average of the parameters."""
    g, log = Generator().manual_seed(seed), []
    opt = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    for i in tqdm(range(steps), what, disable=None, leave=False):
        opt.param_groups[0]["lr"] = lr * min(1, (i + 1) / 60) * min(1, max(0.01, (1 - i / steps) / 0.6))
        value = loss(g)
        opt.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(parameters), 1 - min(0.995, (1 + i) / (10 + i)))
        log.append(value.item())
    return log, average


@torch.no_grad()
def put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, v in zip(parameters, values, strict=True):
        p.copy_(v)


@torch.no_grad()
def encoded(net: FaceLatents, image: Tensor) -> Tensor:
    """(n, 8, 3, 3) latents of pictures in bytes."""
    return torch.cat([net.encode(real(part) * 2 - 1) for part in image.split(512)])


def train_decoder(net: FaceLatents, image: Tensor, config: Config) -> list[float]:
    z = encoded(net, image)

    def loss(g: Generator) -> Tensor:
        k = torch.randint(0, len(z), (64,), generator=g)
        noise = torch.randn(z[k].shape, generator=g) * (torch.rand(64, 1, 1, 1, generator=g) * config.decoder_noise)
        return (net.decode(z[k] + noise) - (real(image[k]) * 2 - 1)).abs().mean()

    log, average = train(list(net.parameters()), loss, config.decoder_steps, 3e-3, config.seed, "decoder")
    put(list(net.parameters()), average)
    return log


def train_judge(p: Pictures, config: Config) -> Judge:
    """On drawn pictures, half of them blurred, with noise; hair's colour is not asked of the bald without a beard."""
    torch.manual_seed(config.seed)
    judge = Judge()
    seen = torch.ones_like(p.people)
    seen[:, 6] = ((p.people[:, 4] < 0.5) | (p.people[:, 0] > 0.5)).float()

    def loss(g: Generator) -> Tensor:
        k = torch.randint(0, len(p.image), (128,), generator=g)
        x = F.avg_pool2d(real(p.image[k]), 2)
        soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
        x = torch.lerp(x, soft, torch.rand(128, 1, 1, 1, generator=g)) + 0.04 * torch.randn(x.shape, generator=g)
        read, mouth, ground = judge(x)
        b = len(BINARY)
        out = F.binary_cross_entropy(read[:, :b].clamp(1e-4, 1 - 1e-4), p.people[k][:, :b])
        out = out + 4 * (seen[k] * (read - p.people[k]).square())[:, b:].mean()
        return out + 0.3 * F.cross_entropy(mouth, p.mouth[k]) + 0.3 * F.cross_entropy(ground, p.ground[k])

    train(list(judge.parameters()), loss, config.judge_steps, 3e-3, config.seed + 1, "judge")
    return judge.eval().requires_grad_(False)


def noised(x0: Tensor, t: Tensor, noise: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the v that is to be predicted; x0 (n, ...), t (n,), kept (1000,)."""
    a = kept[t].sqrt().reshape(-1, *[1] * (x0.ndim - 1))
    s = (1 - kept[t]).sqrt().reshape(a.shape)
    return a * x0 + s * noise, a * noise - s * x0


def stratified(rows: int, groups: int, g: Generator) -> Tensor:
    """(groups * rows,) timesteps: each group's rows lie in different parts of the schedule."""
    at = (torch.arange(rows)[None] + torch.rand(groups, rows, generator=g)) / rows
    return (at * 1000).long().clamp(max=999).flatten()


def train_denoiser(z: Tensor, p: Pictures, config: Config) -> tuple[FaceTransformer, FaceWords, list[float]]:
    torch.manual_seed(config.seed)
    net = FaceTransformer(width=config.width, depth=config.depth, heads=config.heads)
    words = FaceWords()
    net.variance.copy_(z.var(0))
    said = ids(p)
    parameters = [*net.parameters(), *words.parameters()]

    def loss(g: Generator) -> Tensor:
        k = torch.randint(0, len(z), (config.batch,), generator=g)
        t = stratified(config.batch, 1, g)
        noise = torch.randn(z[k].shape, generator=g)
        x, v = noised(z[k], t, noise, net.levels)
        return (net(x, t, words(forget(said[k], g, config.said))).sample - v).square().mean()

    log, average = train(parameters, loss, config.steps, config.lr, config.seed + 2, "denoiser")
    put(parameters, average)
    return net.eval().requires_grad_(False), words.eval().requires_grad_(False), log


# ---- the whole -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(net: Any, words: Any, ids: Tensor, noise: Tensor, guidance: float = 2.0, steps: int = 15) -> Tensor:
    """DDIM from noise (n, 8, 3, 3) under prompts ids (n, 8): latents. The worker does the same; this needs no base."""
    x, said, unsaid = noise, words(ids), words(torch.zeros_like(ids))
    at = (torch.linspace(1000, 0, steps + 1).round().long() - 1).tolist()
    one = torch.ones(())
    for i in range(steps):
        v1, v0 = net(torch.cat([x, x]), at[i], torch.cat([said, unsaid])).sample.chunk(2)
        v = v0 + guidance * (v1 - v0)
        kept, then = net.levels[at[i]], net.levels[at[i + 1]] if at[i + 1] >= 0 else one
        x0, e = kept.sqrt() * x - (1 - kept).sqrt() * v, (1 - kept).sqrt() * x + kept.sqrt() * v
        x = then.sqrt() * x0 + (1 - then).sqrt() * e
    return x


def obeys(net: Any, words: Any, vae: FaceLatents, judge: Judge, n: int, seed: int) -> dict[str, Any]:
    """Share of samples whose mouth, background and looks are what the prompt says, by the judge; n prompts."""
    g = Generator().manual_seed(seed)
    people = identities(n, g)
    p = pictures(people, g)
    out: dict[str, Any] = {"n": n}
    x = ids(p)
    x[:, 3:] = 0
    read, mouth, ground = judge(_show(net, words, vae, x, g))
    out["mouth"] = float((mouth.argmax(1) == p.mouth).float().mean())
    out["background"] = float((ground.argmax(1) == p.ground).float().mean())
    b = len(BINARY)
    out["sure of looks, nothing said"] = float(((read[:, :b] - 0.5).abs() > 0.4).float().mean())
    out["rates, nothing said"] = {k: round(float((read[:, i] > 0.5).float().mean()), 3) for i, k in enumerate(BINARY)}
    read = judge.read(_show(net, words, vae, ids(p), g))
    out["looks"] = {k: round(v, 3) for k, v in balanced(read, people).items() if k in BINARY}
    return out


def _show(net: Any, words: Any, vae: FaceLatents, x: Tensor, g: Generator) -> Tensor:
    noise = torch.randn(len(x), *net.variance.shape, generator=g)
    with torch.no_grad():
        return (vae.decode(sample(net, words, x, noise)) / 2 + 0.5).clamp(0, 1)


def make(config: Config, out: Path) -> dict[str, Any]:
    """Draw, train, measure, write. Returns the card."""
    out.mkdir(parents=True, exist_ok=True)
    clock = time.process_time()
    spent: dict[str, float] = {}

    def lap(name: str) -> None:
        spent[name] = round(time.process_time() - clock - sum(spent.values()), 1)

    g = Generator().manual_seed(config.seed)
    p = drawn(config.pictures, g)
    gt = Generator().manual_seed(config.seed + 1000)
    test = pictures(identities(config.test_pictures, gt), gt)
    lap("pictures")
    vae = latents(p.image, config.whiten)
    z = encoded(vae, p.image)
    lap("latent")
    net, words, log = train_denoiser(z, p, config)
    lap("denoiser")
    judge = train_judge(p, config)
    lap("judge")
    torch.manual_seed(config.seed + 5)
    sharp = train_decoder(vae, p.image, config)
    vae.eval().requires_grad_(False)
    lap("decoder")
    for part in (net, words, vae, judge):
        part.half().float()  # what is measured is what ships
    with torch.no_grad():
        again = torch.cat([vae.decode(vae.encode(x * 2 - 1)) / 2 + 0.5 for x in test.image.split(256)]).clamp(0, 1)
    ends = [round(sum(log[i : i + 100]) / len(log[i : i + 100]), 4) for i in range(0, len(log), max(1, len(log) // 14))]
    numbers = {
        "judge on drawn pictures": _rounded(balanced(judge.read(test.image), test.people)),
        "judge through the latent": _rounded(balanced(judge.read(again), test.people)),
        "latent rmse": round(float((again - test.image).square().mean().sqrt()), 4),
        "test pictures": config.test_pictures,
        "prompts": obeys(net, words, vae, judge, min(400, config.test_pictures), config.seed + 7),
        "denoiser loss": ends, "decoder loss": round(sum(sharp[-50:]) / len(sharp[-50:]), 4),
    }  # fmt: skip
    card = write(out, config, net, words, vae, judge, numbers, spent)
    faces.sheet(_show(net, words, vae, torch.tensor([[1] + [0] * 7]).expand(96, -1), gt), 16).save(out / "samples.png")
    faces.sheet(torch.stack([test.image[:12], again[:12]]).flatten(0, 1), 12).save(out / "latent.png")
    return card


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 3) for k, v in values.items()}


def write(
    out: Path, config: Config, net: FaceTransformer, words: FaceWords, vae: FaceLatents, judge: Judge,
    numbers: dict[str, Any], spent: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """The folder of `lab:faces`: one safetensors of the base, one of the judge, config.json and card.json."""
    parts: dict[str, nn.Module] = {"transformer": net, "words": words, "latents": vae}
    tensors = {
        f"{name}.{k}": v.half().contiguous() for name, part in parts.items() for k, v in part.state_dict().items()
    }
    save_file(tensors, out / WEIGHTS)
    save_file(
        {k: v.half().contiguous() for k, v in judge.state_dict().items() if "num_batches" not in k},
        out / "judge.safetensors",
    )
    about = {
        "_class_name": "LabFaces", "words": {}, "latents": {}, "scheduler": SCHEDULER,
        "transformer": {"width": config.width, "depth": config.depth, "heads": config.heads},
    }  # fmt: skip
    (out / INDEX).write_bytes(manifest.canonical(about))
    card = {
        "name": "lab:faces", "what": "latent diffusion transformer of drawn faces, 64 px", "recipe": asdict(config),
        "seed": config.seed, "faces": faces.VERSION, "mouths": list(MOUTHS), "grounds": list(GROUNDS),
        "parameters": {k: sum(p.numel() for p in v.parameters()) for k, v in parts.items()},
        "cpu_seconds": spent, "numbers": numbers,
        "files": {n: manifest.sha256(out / n) for n in (WEIGHTS, "judge.safetensors", INDEX)},
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


if __name__ == "__main__":
    make(configs.override(RECIPES[sys.argv[1]], sys.argv[3:]), Path(sys.argv[2]))
