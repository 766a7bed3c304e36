"""Train a dictionary on a stream of activations that is never stored.

Activations come in chunks, each a function of its number, so a run that is stopped and resumed is bit for bit the run
that was not (on a CPU). Under `accelerate launch` every process reads other chunks and gradients are averaged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from patches.mechanisms.features import SAE, thresholded
from registry.errors import ConfigError
from training.clip_sae.dictionary import Chunks, Dictionary, SAEConfig
from training.progress import tqdm


def train(
    config: SAEConfig,
    chunks: Chunks,
    site: str = "",
    device: str = "cpu",
    checkpoint: Path | None = None,
    every: int = 1000,
    label: str = "SAE",
) -> tuple[SAE, list[dict[str, float]]]:
    """Train a dictionary.

    Returns its shipped form and the curve: step, fraction of variance unexplained, dead features.

    checkpoint: a safetensors file, written every `every` steps and resumed from if it exists; the caller removes it.
    Raises ConfigError if a chunk holds less than one batch, or if the checkpoint has another config.
    """
    accelerator = _accelerator(device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = str(accelerator.device) if accelerator else device
    batch = config.batch // world
    first = chunks(0).to(device)
    per_chunk = config.passes * (len(first) // batch)
    if not per_chunk:
        raise ConfigError(f"A chunk of {len(first)} tokens holds no batch of {batch}; make chunks larger.")
    inner = Dictionary(config, first.shape[1]).to(device)
    inner.start(first)
    optimizer = torch.optim.Adam(inner.parameters(), lr=config.lr, fused=True)
    step = _resume(inner, optimizer, config, checkpoint) if checkpoint and checkpoint.is_file() else 0
    model, opt = accelerator.prepare(inner, optimizer) if accelerator else (inner, optimizer)
    curve: list[dict[str, float]] = []
    known = (0, first)
    bar = tqdm(total=config.steps, initial=step, desc=label, disable=None if rank == 0 else True, leave=False)
    while step < config.steps:
        number, at = divmod(step, per_chunk)
        number = number * world + rank
        if known[0] != number:
            known = (number, chunks(number).to(device))
        for x in _batches(known[1], batch, config.passes, config.seed + number, at, config.steps - step):
            share = train_step(model, inner, opt, x, config, step, accelerator)
            step += 1
            bar.update()
            if step % 20 == 0 or step == config.steps:
                left, dead = float(share), int((inner.idle > config.dead_after).sum())
                curve.append({"step": step, "unexplained": round(left, 5), "dead": dead})
                bar.set_postfix(unexplained=f"{left:.3f}", dead=dead)
            if checkpoint and rank == 0 and step % every == 0:
                _save(inner, opt, config, step, checkpoint)
    bar.close()
    sae = inner.ship(site)
    return (thresholded(sae, torch.split(known[1], 4096)) if config.method == "batchtopk" else sae), curve


def train_step(
    model: nn.Module, inner: Dictionary, opt: Any, x: Tensor, config: SAEConfig, step: int, accelerator: Any
) -> Tensor:
    """Take one optimiser step on tokens x (N, D), restart dead features; return the unexplained variance fraction."""
    for group in opt.param_groups:
        group["lr"] = config.lr * schedule(config, step)
    outcome: tuple[Tensor, Tensor, Tensor] = model(x)
    loss, share, fired = outcome
    opt.zero_grad(set_to_none=True)
    accelerator.backward(loss) if accelerator else torch.autograd.backward(loss)
    across_rows(inner.decoder)
    nn.utils.clip_grad_norm_(inner.parameters(), config.clip)
    opt.step()
    with torch.no_grad():
        inner.decoder.div_(inner.decoder.norm(dim=1, keepdim=True))
        fired = accelerator.reduce(fired) if accelerator else fired
        inner.idle.add_(1).masked_fill_(fired > 0, 0)
    if config.dead == "resample" and (step + 1) % config.dead_after == 0 and step < config.steps * 2 // 3:
        dead = (inner.idle >= config.dead_after).nonzero()[:, 0]
        if len(dead):
            rows = inner.fresh(x, len(dead), config.seed + step)
            if accelerator:
                from accelerate.utils import broadcast

                rows = broadcast(rows)
            inner.restart(dead, rows)
            _forget(opt, inner, dead)
    return share


def _forget(opt: Any, inner: Dictionary, dead: Tensor) -> None:
    """Reset Adam's moments of restarted rows."""
    for p in (inner.encoder, inner.decoder, inner.bias):
        for moment in ("exp_avg", "exp_avg_sq"):
            opt.state[p][moment][dead] = 0


@torch.no_grad()
def across_rows(weight: nn.Parameter) -> None:
    """Project the gradient of unit rows onto their tangent spaces, so that it does not change their norms."""
    assert weight.grad is not None
    weight.grad.sub_((weight.grad * weight).sum(1, keepdim=True) * weight)


def schedule(config: SAEConfig, step: int) -> float:
    """Return the learning rate at a step as a fraction of its peak: linear warm-up, then a cosine down to `end_lr`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.end_lr + (1 - config.end_lr) * 0.5 * (1 + cos(pi * done))


def _batches(x: Tensor, size: int, passes: int, seed: int, at: int, count: int) -> Iterator[Tensor]:
    """Yield at most `count` batches of a chunk, starting with number `at`; every pass has another order."""
    generator = torch.Generator().manual_seed(seed)
    each = len(x) // size
    orders = [torch.randperm(len(x), generator=generator).to(x.device) for _ in range(passes)]
    for i in range(at, min(passes * each, at + count)):
        yield x[orders[i // each][i % each * size :][:size]]


def _accelerator(device: str) -> Any:
    """Return the accelerator that joins several processes (accelerate launch, torchrun); None in a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu")


def _save(inner: Dictionary, opt: Any, config: SAEConfig, step: int, file: Path) -> None:
    state = {f"model.{k}": v for k, v in inner.state_dict().items()}
    for i, moments in opt.state_dict()["state"].items():
        state |= {f"adam.{i}.{k}": v for k, v in moments.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    about = {"step": str(step), "config": json.dumps(asdict(config), sort_keys=True)}
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, part, about)
    os.replace(part, file)


def _resume(inner: Dictionary, opt: torch.optim.Adam, config: SAEConfig, file: Path) -> int:
    with safe_open(file, "pt") as f:
        about = f.metadata() or {}
        if about.get("config") != json.dumps(asdict(config), sort_keys=True):
            raise ConfigError(f"{file} belongs to another training; remove it, or train with its config.")
        state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  a file is no dict
    inner.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    known = opt.state_dict()
    for key, value in state.items():
        if key.startswith("adam."):
            _, i, name = key.split(".")
            known["state"].setdefault(int(i), {})[name] = value
    opt.load_state_dict(known)
    return int(about["step"])
