"""Domain tuning: a LoRA on the denoiser, trained on pictures of the domain under their own embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patches.families.base import Base
from patches.families.diffusion import Adapter, write_adapter
from registry.errors import ConfigError
from training.diffusion_cf.domains import Pictures
from training.progress import tqdm

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
FOLDER = "adapter"


class _Side(nn.Module):
    """W x + scale B A x, with W frozen."""

    def __init__(self, inner: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) / rank)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        out: Tensor = self.inner(x) + self.scale * F.linear(F.linear(x, self.a), self.b)
        return out


def tune(config: Any, base: Base, train: Pictures, folder: Path, seed: int) -> Adapter:
    """Train the adapter, fold it into `base` (which is changed for good), and write it to `folder`/adapter both ways.

    config: a Tune. A share of rows is told nothing, so that guidance's null half stays what it was.
    """
    pipe = base.model
    torch.manual_seed(seed)
    sides: dict[str, _Side] = {}
    for name, module in list(pipe.denoiser.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            parent = pipe.denoiser.get_submodule(name.rpartition(".")[0])
            sides[name] = _Side(module, config.rank, config.alpha / config.rank)
            setattr(parent, name.rpartition(".")[2], sides[name])
    if not sides:
        raise ConfigError(f"{base.name} has no attention to tune ({', '.join(TARGETS)}).")
    conditions, x0, null = pipe.image(train.x), pipe.latents(train.x), pipe.null()
    optimiser = torch.optim.AdamW([p for s in sides.values() for p in (s.a, s.b)], lr=config.rate, weight_decay=0.0)
    g, alphas = torch.Generator().manual_seed(seed), pipe.schedule.alphas
    for _ in tqdm(range(config.steps), "tuning", disable=None, leave=False):
        at = torch.randint(len(train), (config.batch,), generator=g).tolist()
        told = [null if float(torch.rand((), generator=g)) < config.dropped else conditions[i] for i in at]
        t = torch.randint(len(alphas), (config.batch,), generator=g)
        x, noise = x0[at], torch.randn(x0[at].shape, generator=g)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        want = a * noise - s * x if pipe.schedule.prediction == "v_prediction" else noise
        loss = F.mse_loss(pipe.rows(a * x + s * noise, t.float(), told), want)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    adapter = Adapter({n: (s.a.detach().clone(), s.scale * s.b.detach()) for n, s in sides.items()})
    for name, side in sides.items():
        setattr(pipe.denoiser.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], side.inner)
    adapter.fold(pipe.denoiser)
    write_adapter(adapter, folder / FOLDER)
    return adapter
