"""Fine-tunes a pre-trained VideoMAE on labelled clips, with a learning rate that decays from the head downwards."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from patches.families.video import videomae
from patches.families.video.pixels import Still, normalise, patchify
from registry.errors import BadArtifact
from training.lab.video import actions
from training.lab.worlds import MOTIONS
from training.tasks.motion import Fitted, train
from training.videomae.pretraining import Size, spread


class Classifier(nn.Module):
    """transformers' video classifier over clips of bytes."""

    def __init__(self, net: VideoMAEForVideoClassification, still: Still) -> None:
        super().__init__()
        self.net, self.still = net, still

    def forward(self, video: Tensor) -> Tensor:
        c = self.net.config
        return videomae.classify(self.net, patchify(normalise(video, still=self.still), c.tubelet_size, c.patch_size))


def classifier(size: Size, classes: int, encoder: Any = None, seed: int = 0) -> VideoMAEForVideoClassification:
    """A classifier over a copy of `encoder`'s weights (a VideoMAEModel), or over new ones.

    The pre-training's final norm is left behind and the head is new, as in the official recipe; BadArtifact if any
    other weight is missing or left over.
    """
    torch.manual_seed(seed)
    net = VideoMAEForVideoClassification(size.config(pooled=True, classes=classes))
    spread(net)
    if encoder is not None:
        missing, over = net.videomae.load_state_dict(encoder.state_dict(), strict=False)
        if missing or any(not k.startswith("layernorm.") for k in over):
            raise BadArtifact(f"These weights are no encoder of this size: missing {missing[:3]}, over {over[:3]}.")
    return net


def groups(net: VideoMAEForVideoClassification, peak: float, decay: float) -> list[dict[str, Any]]:
    """Parameters by depth: the head learns at `peak`, each block below it at `decay` times the block above."""
    depth = net.config.num_hidden_layers
    out: dict[int, list[nn.Parameter]] = {}
    for name, p in net.named_parameters():
        found = re.search(r"encoder\.layer\.(\d+)\.", name)
        at = int(found[1]) + 1 if found else 0 if ".embeddings." in name else depth + 1
        out.setdefault(depth + 1 - at, []).append(p)
    return [{"params": ps, "peak": peak * decay**down} for down, ps in sorted(out.items())]


def finetune(
    encoder: Any, size: Size, labelled: actions.Clips, still: Still, steps: int = 200, batch: int = 16,
    peak: float = 2e-3, decay: float = 1.0, seed: int = 0, classes: int = len(MOTIONS), device: str = "cpu",
    bf16: bool = False,
) -> Fitted:  # fmt: skip
    """Fine-tune every weight on labelled clips. encoder: a VideoMAEModel, or None for from scratch."""
    model = Classifier(classifier(size, classes, encoder, seed), still).to(device)
    return train(model, labelled.video, labelled.label, steps, batch, groups(model.net, peak, decay), seed,
                 smoothing=0.1, bf16=bf16)  # fmt: skip


@torch.no_grad()
def features(net: VideoMAEForPreTraining | Any, video: Tensor, still: Still) -> Tensor:
    """(layers + 1, n, N, d): the frozen encoder's state after the embedding and after each block."""
    encoder = getattr(net, "videomae", net)
    c, device = encoder.config, next(encoder.parameters()).device
    at_once = max(1, 6400 // encoder.embeddings.position_embeddings.shape[1])  # 100 clips of the lab, 4 of ViT-B's
    parts = []
    for part in video.split(at_once):
        x = patchify(normalise(part.to(device), still=still), c.tubelet_size, c.patch_size)
        parts.append(torch.stack(videomae.states(encoder, x)).cpu())
    return torch.cat(parts, 1)


def last(net: VideoMAEForPreTraining | Any, video: Tensor, still: Still) -> Tensor:
    """(n, N, d): the state after the last block alone, which is all that the probe reads."""
    return torch.cat([features(net, part, still)[-1] for part in video.split(100)])
