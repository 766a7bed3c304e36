"""One canonical tiny patch per kind of edit and family: what the conformance tests run over.

A member says which family's tiny base it is tried on, and whether it can be folded into weights. Most stand on the
language model, whose forward has caches, padding and positions; beside the shipped mechanisms stand the shapes that
later systems need, so that the engine is held to all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from patches.engine.edits import Act, Side, Weight
from patches.engine.patch import Patch
from patches.families import clip
from patches.families.family import family
from patches.mechanisms.added import AddedConfig, AddedEdit
from patches.mechanisms.direction import DirectionConfig, DirectionEdit
from patches.mechanisms.features import SAE, edit
from patches.mechanisms.heads import HeadConfig, HeadEdit
from patches.mechanisms.neurons import ablate
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.mechanisms.subspace import Layer, SubspaceConfig, SubspaceEdit, linear_layers, size

D, M = 32, 48


@dataclass(frozen=True)
class Member:
    """A patch, the family it is tried on, and whether it has a form in weights."""

    make: Callable[[], Patch]
    folds: bool = False
    family: str = "llm"


@dataclass(frozen=True)
class NoConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class Erase(Patch):
    """Project a direction out of every token (as a VLM erasure would)."""

    Config = NoConfig

    def edits(self):
        d = self.tensors["d"]
        return [Act("model.layers.1", lambda x, _: x - (x @ d)[..., None] * d)]


@dataclass(frozen=True)
class ClipErase(Patch):
    """The same in an image tower."""

    Config = NoConfig

    def edits(self):
        d = self.tensors["d"]
        return [Act(clip.site("block", 1), lambda x, _: x - (x @ d)[..., None] * d)]


@dataclass(frozen=True)
class LowRank(Patch):
    """A rank-2 weight edit as a side path, so that rows can differ (as a subspace of LoRAs would)."""

    Config = NoConfig

    def edits(self):
        a, b = self.tensors["a"], self.tensors["b"]
        return [Side("model.layers.1.mlp.up_proj", lambda x, _: x @ a.T @ b.T)]

    def weights(self):
        delta = self.tensors["b"] @ self.tensors["a"]
        return [Weight("model.layers.1.mlp.up_proj", lambda p: {"weight": p["weight"] + delta})]


@dataclass(frozen=True)
class Scale(Patch):
    """A pure weight edit."""

    Config = NoConfig

    def edits(self):
        return [Weight("model.layers.0.mlp.down_proj", lambda p: {"weight": p["weight"] * self.tensors["scale"]})]


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def _dictionary(activation: str = "relu", normalise: str = "none") -> SAE:
    """64 features of the tiny model's width; every activation function an autoencoder may have."""
    F = 64
    return SAE(
        encoder=_seeded(F, D),
        bias=_seeded(F),
        decoder=torch.nn.functional.normalize(_seeded(F, D), dim=1),
        decoder_bias=torch.zeros(D),
        activation=activation,
        k=8 if activation == "topk" else 0,
        threshold=torch.full((F,), 0.1) if activation == "jumprelu" else None,
        normalise=normalise,
    )


def _heads(mode: str = "zero", **tensors: torch.Tensor) -> HeadEdit:
    """Three of the tiny model's heads, four a layer."""
    site = "model.layers.{i}.self_attn.o_proj"
    return HeadEdit(HeadConfig(site, ((0, 1), (2, 0), (2, 3)), 4, mode), tensors)


def _subspace(*layers: Layer) -> SubspaceEdit:
    """A point of a random weight space, by default over two projections of the tiny language model."""
    layers = layers or tuple(Layer(f"model.layers.{i}.mlp.up_proj", (1, D), (M, 1)) for i in (0, 2))
    d, m = size(layers), 3
    tensors = {
        "mean": _seeded(d) * 0.5, "sd": torch.full((d,), 0.2), "basis": torch.linalg.qr(_seeded(d, m)).Q,
        "std": torch.tensor([3.0, 2.0, 1.0]), "z": torch.tensor([1.0, -1.0, 0.5]),
    }  # fmt: skip
    return SubspaceEdit(SubspaceConfig(layers, 1.5), tensors)


LLM: dict[str, Callable[[], Patch]] = {
    "sink-zero": lambda: SinkEdit(SinkConfig(neurons=((0, 1), (0, 7), (1, 3))), {}),
    "sink-clip": lambda: SinkEdit(
        SinkConfig(neurons=((0, 1), (0, 7), (1, 3)), mode="clip"), {"value": torch.tensor([0.01, 0.02, 0.01])}
    ),
    "sink-mean": lambda: SinkEdit(
        SinkConfig(neurons=((0, 1), (0, 7), (1, 3)), mode="mean"), {"value": torch.tensor([0.5, -0.5, 0.3])}
    ),
    "sink-everywhere": lambda: SinkEdit(SinkConfig(neurons=((0, 1), (0, 7), (1, 3)), keep_first=False), {}),
    "added-factors": lambda: _added(),
    "added-vectors": lambda: _added(True),
    "sink-damp": lambda: SinkEdit(SinkConfig(damp_layers=(0, 2), damp_limit=2.0), {}),
    "sink-repeats": lambda: SinkEdit(SinkConfig(neurons=((1, 5), (2, 6)), only_repeats=True), {}),
    "sink-all": lambda: SinkEdit(
        SinkConfig(neurons=((1, 5), (2, 6)), only_repeats=True, damp_layers=(0,), damp_limit=2.0), {}
    ),
    "sink-runs": lambda: SinkEdit(SinkConfig(damp_layers=(0,), damp_limit=2.0, run_layers=(1, 2), run_limit=1.0), {}),
    "sink-both": lambda: SinkEdit(SinkConfig(neurons=((2, 5),), damp_layers=(0,), damp_limit=1.0), {}),
    "features-zero": lambda: edit(_dictionary(), "model.layers.1", range(0, 40, 2)),
    "features-clamp": lambda: edit(_dictionary("jumprelu"), "model.layers.1", (3, 9), "clamp", 2.0),
    "features-scale": lambda: edit(_dictionary("topk"), "model.layers.0", range(32), "scale", 3.0),
    "features-cap": lambda: edit(_dictionary("relu", "layer_norm"), "model.layers.2.mlp", range(32), "cap", 0.05),
    "features-add": lambda: edit(_dictionary(), "model.layers.1", (5, 6), "add", 1.5),
    "neurons-mean": lambda: ablate("model.layers.1.mlp.down_proj", range(0, M, 3), _seeded(M)[::3]),
    "neurons-zero": lambda: ablate("model.layers.0.mlp.down_proj", range(0, M, 2), torch.zeros(M // 2)),
    "neurons-gain": lambda: ablate(
        "model.layers.2.mlp.down_proj", (1, 5, 7), torch.zeros(3), torch.tensor([3.0, -1, 0])
    ),
    "heads-zero": lambda: _heads(),
    "heads-mean": lambda: _heads("mean", value=_seeded(3, D // 4)),
    "heads-scale": lambda: _heads("scale", factor=torch.tensor([0.5, 2.0, -1.0])),
    "subspace": _subspace,
    "erase": lambda: Erase(NoConfig(), {"d": torch.nn.functional.normalize(_seeded(D), dim=0)}),
    "low-rank": lambda: LowRank(NoConfig(), {"a": _seeded(2, D), "b": _seeded(M, 2)}),
    "weights": lambda: Scale(NoConfig(), {"scale": torch.tensor(1.3)}),
}
FOLDS = ("sink-everywhere", "neurons-zero", "neurons-gain", "heads-zero", "heads-scale", "low-rank", "weights",
         "subspace", "added-factors")  # fmt: skip
"""Names of LLM that have a form in weights; the others are refused with what to do instead. A mean needs a bias to go
to,
and the tiny Llama has none"""


def _clip_heads(mode: str = "zero", tokens: str = "all", **tensors: torch.Tensor) -> HeadEdit:
    """Three of the tiny CLIP's heads, four a layer."""
    return HeadEdit(HeadConfig(clip.SITES["heads"], ((0, 1), (1, 0), (1, 3)), 4, mode, tokens), tensors)


def _direction(norm: str) -> DirectionEdit:
    """Two domains of two classes in the tiny diffusion model's image embedding."""
    config = DirectionConfig("given.image", ("a", "b", "c", "d"), ("one", "one", "two", "two"), norm=norm)
    return DirectionEdit(config, {"means": torch.nn.functional.normalize(_seeded(4, 24), dim=1)})


@cache
def _denoiser() -> Any:
    """The tiny diffusion model that `Family.tiny` makes."""
    return family("diffusion").tiny(0).model


def _denoising() -> dict[str, torch.Tensor]:
    pipe = _denoiser()
    told = {name: _seeded(4, *shape) for name, shape in pipe.conditions.items()}
    return {"sample": _seeded(4, *pipe.shape), "timestep": torch.tensor([20.0, 300.0, 700.0, 950.0]), **told}


def _added(vectors: bool = False) -> AddedEdit:
    """Factors at two projections, or a vector after a block."""
    if vectors:
        return AddedEdit(AddedConfig(vectors=("model.layers.1",), amount=2.0), {"v.model.layers.1": _seeded(D)})
    sites = ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.up_proj")
    tensors = {f"a.{s}": _seeded(2, D) for s in sites}
    return AddedEdit(
        AddedConfig(factors=sites), tensors | {f"b.{s}": _seeded(n, 2) for s, n in zip(sites, (D, M), strict=True)}
    )


MEMBERS: dict[str, Member] = {
    **{f"llm {name}": Member(make, name in FOLDS) for name, make in LLM.items()},
    "clip features-zero": Member(lambda: edit(_dictionary(), clip.site("block", 1), range(0, 40, 2)), family="clip"),
    "clip features-scale, class token": Member(
        lambda: edit(_dictionary("jumprelu"), clip.site("block", 0), range(32), "scale", 3.0, "cls"), family="clip"
    ),
    "clip heads-mean": Member(lambda: _clip_heads("mean", value=_seeded(3, D // 4)), True, "clip"),
    "clip heads-zero, class token": Member(lambda: _clip_heads(tokens="cls"), False, "clip"),
    "clip neurons-mean": Member(
        lambda: ablate(clip.site("neurons", 1), range(0, 128, 3), _seeded(128)[::3]), True, "clip"
    ),
    "diffusion subspace": Member(
        lambda: _subspace(*linear_layers(_denoiser(), ("to_v", "to_out.0"), 2, under="denoiser")), True, "diffusion"
    ),
    "clip erase": Member(
        lambda: ClipErase(NoConfig(), {"d": torch.nn.functional.normalize(_seeded(D), dim=0)}), family="clip"
    ),
    "diffusion direction": Member(lambda: _direction("unit"), family="diffusion"),
    "diffusion direction, free": Member(lambda: _direction("free"), family="diffusion"),
}
"""family and name -> member"""
MECHANISMS = LLM
"""those of the language model, by name"""


@dataclass(frozen=True)
class Probe:
    """What a family's base is asked in conformance tests: a batch of four rows, and the numbers of the answer."""

    inputs: Callable[[], dict[str, torch.Tensor]]
    """by keyword of the model's forward"""
    read: Callable[[Any], torch.Tensor]
    """the forward's output -> (4, ...)"""


def _ids() -> torch.Tensor:
    ids = torch.randint(3, 90, (4, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 6:12] = ids[:, 6:7]  # repeats, so that damping has something to damp
    return ids


PROBES = {
    "llm": Probe(lambda: {"input_ids": _ids()}, lambda out: out.logits),
    "diffusion": Probe(_denoising, lambda out: out),
    "clip": Probe(lambda: {"image": _seeded(4, 3, 32, 32)}, lambda out: out["image_features"]),
}
"""family -> how it is asked; a family that mechanisms are tried on says so here"""
