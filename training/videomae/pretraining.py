"""Pre-trains a VideoMAE on drawn clips, resumable: a run that is killed goes on to the weights it would have had.

Every batch, its views and its masks are functions of (seed, step), so a checkpoint needs no generator's state: weights,
both moments of AdamW and the number of the step are all. Several processes (through `accelerate`) each take their rows
of the same batch, so one process and two train on the same clips.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from patches.families.video import videomae
from patches.families.video.pixels import IMAGENET_MEAN, Still, normalise, patchify, split
from registry.errors import Conflict
from training.tasks.motion import autocast, optimiser_of, rate, set_rate

STATE, WEIGHTS = "state.json", "state.safetensors"


@dataclass(frozen=True)
class Size:
    """A VideoMAE's sizes."""

    width: int = 64
    depth: int = 3
    heads: int = 2
    decoder_width: int = 32
    decoder_depth: int = 1
    decoder_heads: int = 2
    image: int = 32
    patch: int = 8
    frames: int = 8
    tubelet: int = 2
    norm_pix: bool = False
    """each patch's colours normalised, as the paper; on the lab's noisy grounds that makes noise the whole loss"""

    def config(self, pooled: bool = False, classes: int = 2) -> VideoMAEConfig:
        """transformers' config. pooled: a classifier's, whose final norm comes after the mean over tokens."""
        return VideoMAEConfig(
            image_size=self.image, patch_size=self.patch, num_frames=self.frames, tubelet_size=self.tubelet,
            hidden_size=self.width, num_hidden_layers=self.depth, num_attention_heads=self.heads,
            intermediate_size=4 * self.width, decoder_hidden_size=self.decoder_width,
            decoder_num_hidden_layers=self.decoder_depth, decoder_num_attention_heads=self.decoder_heads,
            decoder_intermediate_size=4 * self.decoder_width, norm_pix_loss=self.norm_pix, use_mean_pooling=pooled,
            layer_norm_eps=1e-6, num_labels=classes,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How long and how to pre-train."""

    steps: int = 2000
    batch: int = 64
    peak: float = 2e-3
    decay: float = 0.05
    warm: float = 0.05
    """share of the steps"""
    ratio: float = 0.75
    mask: Literal["tube", "random"] = "random"
    still: Still = "mean"
    seed: int = 0
    save_every: int = 500
    bf16: bool = False
    """autocast; on CUDA only: a CPU without bf16 units is 30 times slower with it"""
    compile: bool = False


class Learner(nn.Module):
    """The loss as a module's forward, which is what data parallelism wraps."""

    def __init__(self, net: VideoMAEForPreTraining) -> None:
        super().__init__()
        self.net = net

    def forward(self, patches: Tensor, keep: Tensor, hide: Tensor) -> Tensor:
        return videomae.loss(self.net, patches, keep, hide)


def new(size: Size, seed: int) -> VideoMAEForPreTraining:
    """A model of random weights: Xavier's in every linear layer, as the official code, not transformers' 0.02.

    Patches are put on the scale of their positions (they come from D inputs, not from d), and without normalised
    targets the decoder begins at their mean, to which Adam would otherwise walk for hundreds of steps.
    """
    torch.manual_seed(seed)
    net = VideoMAEForPreTraining(size.config())
    spread(net)
    nn.init.normal_(net.mask_token, std=0.02)
    if not size.norm_pix:
        with torch.no_grad():
            net.decoder.head.bias.copy_(torch.tensor(IMAGENET_MEAN).repeat(len(net.decoder.head.bias) // 3))
            net.decoder.head.weight.mul_(0.1)
    return net


def spread(net: nn.Module) -> None:
    """Xavier's weights for linear layers, queries and keys near the identity, patches on the scale of positions.

    With queries and keys alike, a token attends at first to tokens at near positions (Trockman and Kolter, 2023). From
    random ones a narrow model finds no way from a hidden patch to its neighbours in hundreds of steps: where the ground
    was taken away, what all tokens have in common says nothing.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    with torch.no_grad():
        for name, module in net.named_modules():
            if name.endswith(("attention.query", "attention.key")):
                module.weight.mul_(0.3).add_(torch.eye(len(module.weight)))  # type: ignore[operator, arg-type]
    base: Any = getattr(net, "videomae", net)
    nn.init.normal_(base.embeddings.patch_embeddings.projection.weight, std=0.03)


def varied(video: Tensor, g: Generator) -> Tensor:
    """One of 96 views of a batch: mirrored, turned, reversed in time, colours swapped. Not where there are labels."""
    axes = [axis for axis in (1, 3, 4) if torch.rand((), generator=g) < 0.5]
    video = video.flip(axes) if axes else video
    if torch.rand((), generator=g) < 0.5:
        video = video.transpose(3, 4)
    return video[:, :, torch.randperm(3, generator=g)]


def batch_of(pool: Tensor, size: Size, plan: Plan, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The clips (b, T, 3, R, R), seen and hidden patches of one step: a function of (seed, step)."""
    g = Generator().manual_seed(plan.seed * 1_000_003 + step)
    rows = torch.randint(len(pool), (plan.batch,), generator=g)
    video = varied(pool[rows], g)
    slices, places = size.frames // size.tubelet, (size.image // size.patch) ** 2
    keep, hide = split(plan.batch, slices, places, plan.ratio, g, plan.mask)
    return video, keep, hide


def pretrain(
    pool: Tensor, size: Size, plan: Plan, folder: Path | None = None, device: str = "cpu",
    say: Callable[[int, float], Any] | None = None, accelerator: Any = None,
) -> tuple[VideoMAEForPreTraining, dict[str, Any]]:  # fmt: skip
    """Train on a pool (n, T, 3, R, R) of bytes; the model, and a log of its losses and speed.

    folder: where to keep checkpoints and go on from; Conflict if it holds one of another plan. accelerator: of
    `accelerate`, for several devices. say(step, loss): called every 50 steps.
    """
    net = new(size, plan.seed).to(device)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "peak": plan.peak}, {"params": plain, "peak": plan.peak, "weight_decay": 0.0}]
    optimiser = optimiser_of(groups, plan.decay, (0.9, 0.95))
    start = _resume(folder, net, optimiser, size, plan) if folder else 0
    learner: Any = Learner(net)
    rank, world = 0, 1
    if accelerator is not None:
        learner, optimiser = accelerator.prepare(learner, optimiser)
        rank, world, device = accelerator.process_index, accelerator.num_processes, str(accelerator.device)
    if plan.compile:
        learner = torch.compile(learner)
    losses: list[float] = []
    begun, wall = time.process_time(), time.time()
    net.train()
    for step in range(start, plan.steps):
        set_rate(optimiser, rate(step, plan.steps, int(plan.warm * plan.steps)))
        video, keep, hide = (x[rank::world].to(device) for x in batch_of(pool, size, plan, step))
        patches = patchify(normalise(video, still=plan.still), size.tubelet, size.patch)
        with autocast(device, plan.bf16):
            off = learner(patches, keep, hide)
        optimiser.zero_grad()
        off.backward() if accelerator is None else accelerator.backward(off)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        losses.append(off.detach())  # read only now and then: reading waits for the device
        if say is not None and step % 50 == 0:
            say(step, float(off.detach()))
        if folder and rank == 0 and (step + 1) % plan.save_every == 0 and step + 1 < plan.steps:
            _save(folder, net, optimiser, size, plan, step + 1)
    cpu, done = time.process_time() - begun, plan.steps - start
    curve = [float(x) for x in losses]
    log = {
        "steps": plan.steps, "clips": plan.steps * plan.batch, "cpu_s": round(cpu, 1),
        "wall_s": round(time.time() - wall, 1), "clips_per_cpu_s": round(done * plan.batch / max(cpu, 1e-9), 1),
        "loss": [round(sum(c) / len(c), 6) for i in range(0, len(curve), 50) if (c := curve[i : i + 50])],
    }  # fmt: skip
    return net.eval(), log


def _about(size: Size, plan: Plan) -> dict[str, Any]:
    return json.loads(
        json.dumps({"size": vars(size), "plan": {k: v for k, v in vars(plan).items() if k != "save_every"}})
    )


def _save(
    folder: Path, net: nn.Module, optimiser: torch.optim.Optimizer, size: Size, plan: Plan, step: int
) -> None:  # fmt: skip
    """Write a checkpoint whole or not at all: weights first under another name, then both renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {f"net.{k}": v.contiguous() for k, v in net.state_dict().items()}
    inner = getattr(optimiser, "optimizer", optimiser)
    for i, state in inner.state_dict()["state"].items():  # by key: after a resume they come in another order
        out |= {f"opt.{i}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    name = f"state-{step}.safetensors"
    save_file(out, folder / f".{name}")
    os.replace(folder / f".{name}", folder / name)
    part = folder / f".{STATE}"
    part.write_text(json.dumps({"step": step, "file": name, **_about(size, plan)}))
    os.replace(part, folder / STATE)
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def _resume(folder: Path, net: nn.Module, optimiser: torch.optim.Optimizer, size: Size, plan: Plan) -> int:
    """Load the checkpoint in `folder`, if there is one; the step to go on from."""
    if not (folder / STATE).is_file():
        return 0
    about = json.loads((folder / STATE).read_text())
    if {k: about[k] for k in ("size", "plan")} != _about(size, plan):
        raise Conflict(f"{folder} holds a checkpoint of another plan. Delete it, or name another folder.")
    held = load_file(folder / about["file"])
    net.load_state_dict({k[4:]: v for k, v in held.items() if k.startswith("net.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in held.items():
        if name.startswith("opt."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    whole = optimiser.state_dict()
    optimiser.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
    return int(about["step"])
