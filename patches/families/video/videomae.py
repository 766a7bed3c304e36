"""Runs transformers' VideoMAE over indices of patches: the same weights and numbers, without its boolean gathers.

transformers embeds every patch with a 3-D convolution and then drops three quarters of them with boolean masks, which
costs a device synchronisation a mask and has shapes that depend on data. Here only the patches that are seen are
embedded (a linear map, since the convolution's stride is its kernel), and everything is gathered by index, so shapes
are static: `torch.compile` and ONNX take it. Modules are called as they stand, so hooks on them see what they would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from patches.families.video.pixels import IMAGENET_MEAN, IMAGENET_STD


def grid(config: VideoMAEConfig) -> tuple[int, int]:
    """Slices of time and places in each."""
    return config.num_frames // config.tubelet_size, (config.image_size // config.patch_size) ** 2


def positions(module: Any, like: Tensor) -> Tensor:
    """(1, N, d) sin-cos positions on the right device; transformers keeps them outside of its buffers."""
    table: Tensor = module.position_embeddings
    if table.device != like.device or table.dtype != like.dtype:
        table = table.to(like.device, like.dtype)
        module.position_embeddings = table
    return table


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x (b, N, d) at rows (b, M) -> (b, M, d)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def embed(encoder: Any, patches: Tensor, keep: Tensor | None = None) -> Tensor:
    """Embed patches (b, N, D) that are in `keep` (b, M), or all: (b, M, d) with their positions added."""
    conv = encoder.embeddings.patch_embeddings.projection
    weight = conv.weight.permute(0, 2, 3, 4, 1).flatten(1)  # in the order of `patchify`
    seen = patches if keep is None else take(patches, keep)
    x = nnf.linear(seen.to(weight.dtype), weight, conv.bias)
    table = positions(encoder.embeddings, x)
    return x + (table if keep is None else table[0][keep])


def encode(encoder: Any, patches: Tensor, keep: Tensor | None = None) -> Tensor:
    """The encoder's last state (b, M, d), after its final norm if it has one."""
    x = embed(encoder, patches, keep)
    for layer in encoder.encoder.layer:
        x = layer(x)
    return x if encoder.layernorm is None else encoder.layernorm(x)


def states(encoder: Any, patches: Tensor) -> list[Tensor]:
    """The states (b, N, d) after the embedding and after every block: layers + 1 of them, no final norm."""
    out = [embed(encoder, patches)]
    for layer in encoder.encoder.layer:
        out.append(layer(out[-1]))
    return out


def reconstruct(net: VideoMAEForPreTraining, patches: Tensor, keep: Tensor, hide: Tensor) -> Tensor:
    """Predict the hidden patches (b, M, D) from those that are seen, on the scale of `targets`."""
    seen = net.encoder_to_decoder(encode(net.videomae, patches, keep))
    table = positions(net, seen)[0]
    x = torch.cat([seen + table[keep], net.mask_token + table[hide]], 1)
    for layer in net.decoder.decoder_layers:
        x = layer(x)
    out: Tensor = net.decoder.head(net.decoder.norm(x[:, keep.shape[1] :]))
    return out


def targets(config: VideoMAEConfig, patches: Tensor, hide: Tensor) -> Tensor:
    """What hidden patches should be predicted as (b, M, D): pixels in [0, 1], or each patch's colours normalised."""
    x = take(patches, hide).unflatten(-1, (-1, 3))
    x = x * x.new_tensor(IMAGENET_STD) + x.new_tensor(IMAGENET_MEAN)
    if config.norm_pix_loss:
        x = (x - x.mean(-2, keepdim=True)) / (x.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    return x.flatten(-2)


def loss(net: VideoMAEForPreTraining, patches: Tensor, keep: Tensor, hide: Tensor) -> Tensor:
    """Mean squared error over the hidden patches: equation 1 of VideoMAE, as transformers computes it."""
    out = reconstruct(net, patches, keep, hide)
    return nnf.mse_loss(out.float(), targets(net.config, patches, hide))


def classify(net: Any, patches: Tensor) -> Tensor:
    """Class scores (b, C) of transformers' VideoMAEForVideoClassification."""
    x = encode(net.videomae, patches)
    x = net.fc_norm(x.mean(1)) if net.fc_norm is not None else x[:, 0]
    out: Tensor = net.classifier(x)
    return out
