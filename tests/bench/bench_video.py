"""Video: pre-training against the official recipe's code path, and rollouts with a KV cache against recomputing.

The official path is written out as the public code has it: a 3-D convolution over every patch, boolean masks that
gather (three of them), attention as softmax(Q K^T) V, AdamW parameter by parameter, `.item()` every step. Both train
the same weights on the same batches, turn about, on the same device.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from patches.families.video import TokenVideo, llama, videomae
from patches.families.video.pixels import IMAGENET_MEAN, IMAGENET_STD, bool_mask, normalise, patchify
from patches.families.video.tokens import RESERVED, Codebook
from training.lab.video import actions
from training.videomae.pretraining import Plan, Size, batch_of, new

pytestmark = pytest.mark.bench


def _attend(module, x: Tensor) -> Tensor:
    """Multi-head attention with its matrix of weights formed, as timm's Attention before fused kernels."""
    b, n, d = x.shape
    heads = module.attention.num_attention_heads
    q, k, v = (getattr(module.attention, name)(x).view(b, n, heads, d // heads).transpose(1, 2) for name in
               ("query", "key", "value"))  # fmt: skip
    weight = ((q * (d // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return module.output.dense((weight @ v).transpose(1, 2).reshape(b, n, d))


def _block(layer, x: Tensor) -> Tensor:
    x = x + _attend(layer.attention, layer.layernorm_before(x))
    return x + layer.output.dense(nn.functional.gelu(layer.intermediate.dense(layer.layernorm_after(x))))


def official(net, x: Tensor, mask: Tensor, tubelet: int, patch: int) -> Tensor:
    """The loss of pixels (b, T, 3, R, R) under a boolean mask (b, N), as the official forward computes it."""
    b = len(x)
    seen = net.videomae.embeddings.patch_embeddings(x)  # every patch, by convolution
    seen = seen + net.videomae.embeddings.position_embeddings.type_as(seen).to(seen.device).clone().detach()
    seen = seen[~mask].reshape(b, -1, seen.shape[-1])
    for layer in net.videomae.encoder.layer:
        seen = _block(layer, seen)
    seen = net.encoder_to_decoder(net.videomae.layernorm(seen))
    places = net.position_embeddings.expand(b, -1, -1).type_as(seen).to(seen.device).clone().detach()
    at_seen = places[~mask].reshape(b, -1, seen.shape[-1])
    at_hidden = places[mask].reshape(b, -1, seen.shape[-1])
    whole = torch.cat([seen + at_seen, net.mask_token + at_hidden], 1)
    for layer in net.decoder.decoder_layers:
        whole = _block(layer, whole)
    out = net.decoder.head(net.decoder.norm(whole[:, -at_hidden.shape[1] :]))
    with torch.no_grad():
        mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        target = patchify(x * std + mean, tubelet, patch)
        target = target[mask].reshape(b, -1, target.shape[-1])
    return nn.functional.mse_loss(out, target)


LAB = Size(), Plan(batch=64), 24
PAPER = Size(image=224, patch=16, frames=16), Plan(batch=2, ratio=0.9, mask="tube"), 10
"""the paper's 1,568 tokens of a clip, nine tenths hidden, at the lab's width"""


@pytest.mark.parametrize(("size", "plan", "steps"), [LAB, PAPER], ids=["64 tokens", "1568 tokens"])
def bench_pretraining_against_the_official_path(size: Size, plan: Plan, steps: int) -> None:
    """Steps of both, turn about; clips a processor second of each, and that both compute the same loss."""
    g = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 256, (64, size.frames, 3, size.image, size.image), generator=g, dtype=torch.uint8)
    nets = {"official": new(size, 0), "ours": new(size, 0)}
    optimisers = {
        "official": torch.optim.AdamW(nets["official"].parameters(), 1e-3, foreach=False, fused=False),
        "ours": torch.optim.AdamW(nets["ours"].parameters(), 1e-3, fused=True),
    }
    spent, losses, warm = dict.fromkeys(nets, 0.0), {name: [] for name in nets}, 2
    for step in range(steps):
        for name, net in nets.items():
            begun = time.process_time()
            video, keep, hide = batch_of(pool, size, plan, step)
            x = normalise(video, still=plan.still)
            if name == "official":
                off = official(net, x, bool_mask(hide, keep.shape[1] + hide.shape[1]), size.tubelet, size.patch)
            else:
                off = videomae.loss(net, patchify(x, size.tubelet, size.patch), keep, hide)
            optimisers[name].zero_grad()
            off.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimisers[name].step()
            losses[name].append(off.item())  # official: waits every step; ours only here, to compare
            spent[name] += (time.process_time() - begun) * (step >= warm)
    rate = {name: (steps - warm) * plan.batch / s for name, s in spent.items()}
    print(f"\npre-training, clips a CPU second: official path {rate['official']:.1f}, ours {rate['ours']:.1f}, "
          f"x {rate['ours'] / rate['official']:.2f}")  # fmt: skip
    assert losses["official"][0] == pytest.approx(losses["ours"][0], rel=1e-4)
    assert rate["ours"] > rate["official"]


def bench_a_cached_rollout_against_recomputing() -> None:
    """One clip of 8 frames of 64 tokens, 4 given, greedy; the naive way is timed on one frame and scaled up by its own
    lengths."""
    torch.manual_seed(0)
    lm = llama(192, 6, 6, RESERVED + 256, 8 * 64 + 2).eval()
    model = TokenVideo(lm, Codebook(torch.randn(256, 48) * 0.3, 4, 1, True), 8, 32).eval()
    clip = actions.draw("test", 1).video
    with torch.inference_mode():
        begun = time.process_time()
        cached, _ = model.rollout(clip, 4)
        with_cache = time.process_time() - begun
        begun = time.process_time()
        naive = next(model.roll(clip, 4, cached=False))[0]
        one = time.process_time() - begun
    # recomputing costs in proportion to the length: frame f has lengths from 64 (f - 1) on
    recomputing = one * sum(range(4, 8)) / 4
    print(f"\nrollout of 4 x 64 tokens, CPU s: cached {with_cache:.2f}, recomputed {recomputing:.2f}, "
          f"x {recomputing / with_cache:.1f}")  # fmt: skip
    assert torch.allclose(cached[:, 4], naive, atol=1e-5)
    assert recomputing > 5 * with_cache
