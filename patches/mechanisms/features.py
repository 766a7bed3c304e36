"""Sparse autoencoders at one site of a base: read its features, and edit chosen ones.

    f = act(E n(x) + b),   x^ = n^-1(f W + c)        x (D,) one token, f (F,), E and W (F, D), one row per feature

What the autoencoder does not explain is kept (the error term): x' = Dec(f') + (x - Dec(f)). Decoding is linear, so with
only the features S changed this is exactly

    x' = x + scale(x) * sum_{j in S} (f'_j - f_j) W_j

and neither the other rows of W nor c are needed. Whether feature j fires depends on its own encoder row alone for relu
and jumprelu, so an edit carries |S| rows of E too; top-k needs all pre-activations to know the k-th, or a dictionary
converted by `thresholded` first: what is trained is not what is shipped (Bussmann, Leask, Nanda, arXiv 2412.06410).
Steering and suppression: Joseph et al., arXiv 2504.08729. Published dictionaries in the layouts of SAELens and Prisma
are read without pickle; ours are written in SAELens' layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs
from patches.engine.patch import Patch
from registry.config import STRICT
from registry.errors import BadArtifact, PatchError

Activation = Literal["relu", "topk", "jumprelu"]
Normalise = Literal["none", "layer_norm", "norm"]
"""How each token is normalised before encoding: not; minus its mean, over its standard deviation; to norm sqrt(D)"""
Op = Literal["zero", "clamp", "cap", "scale", "add"]
Tokens = Literal["all", "cls", "patches", "mask"]
EPS = 1e-5

ROWS = 256
"""Tokens encoded at once on a CPU; pre-activations of more exceed its cache"""


# ---- the dictionary ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SAE:
    """Sparse autoencoder of one site, in one canonical form whatever library trained it."""

    encoder: Tensor
    """(F, D) encoder rows"""
    bias: Tensor
    """(F,) encoder bias; a decoder bias that is subtracted from the input is folded in"""
    decoder: Tensor
    """(F, D) decoder rows"""
    decoder_bias: Tensor
    """(D,) decoder bias"""
    activation: Activation = "relu"
    """Activation function of the encoder"""
    k: int = 0
    """Features that may be active per token, for the activation `topk`"""
    threshold: Tensor | None = None
    """(F,) thresholds >= 0 of the activation `jumprelu`"""
    normalise: Normalise = "none"
    site: str = ""
    """Site it was trained on: one of our module paths, or its own library's hook name"""

    def __post_init__(self) -> None:
        F, D = self.decoder.shape if self.decoder.ndim == 2 else (0, 0)
        shapes = {"encoder": (F, D), "bias": (F,), "decoder_bias": (D,)}
        if self.activation == "jumprelu":
            shapes["threshold"] = (F,)
        for name, want in shapes.items():
            got = getattr(self, name)
            if not F or got is None or tuple(got.shape) != want:
                have = "nothing" if got is None else list(got.shape)
                raise BadArtifact(f"An autoencoder with decoder {list(self.decoder.shape)} has {name} {have}.")
        if self.activation == "topk" and not 0 < self.k <= F:
            raise BadArtifact(f"top-k of {F} features needs 0 < k <= {F}, not k={self.k}.")

    def encode(self, x: Tensor) -> Tensor:
        """Encode x (..., D) into feature activations (..., F) >= 0."""
        n, _, _ = normalised(x.to(self.encoder.dtype), self.normalise)
        return self.fire(torch.nn.functional.linear(n, self.encoder, self.bias))

    def fire(self, pre: Tensor) -> Tensor:
        """Apply the activation function to pre-activations (..., F)."""
        if self.activation == "topk":
            values, at = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, at, values.relu_())
        return _threshold(pre, self.threshold)

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """Reconstruct (..., D) from activations f. x: the input of f, for undoing its normalisation."""
        _, scale, shift = normalised(x.to(self.encoder.dtype), self.normalise)
        return (f @ self.decoder + self.decoder_bias) * scale + shift

    def to(self, device: torch.device | str) -> SAE:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def normalised(x: Tensor, how: Normalise) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Normalise tokens: n(x) (..., D), with scale (..., 1) and shift (..., 1) such that x = n(x) * scale + shift.

    As SAELens and Prisma do.
    """
    if how == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = x.std(-1, keepdim=True)  # unbiased; eps when normalising only, as in both libraries
        return (x - shift) / (scale + EPS), scale, shift
    if how == "norm":
        scale = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / x.shape[-1] ** 0.5
        return x / scale, scale, 0.0
    return x, 1.0, 0.0


def kth_largest(x: Tensor, k: int) -> Tensor:
    """Return the k-th largest value (N, 1) of each row of x (N, F), exactly, ties included. x may lose its order."""
    F = x.shape[1]
    # numpy's quickselect is vectorised, four times as fast as topk, but single-threaded
    if _plain(x) and x.dtype == torch.float32 and torch.get_num_threads() < 4:
        rows = x.detach().numpy()
        rows.partition(F - k, axis=1)  # in place: a copy costs a third as much again
        return torch.from_numpy(rows[:, F - k : F - k + 1])
    return x.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _plain(x: Tensor) -> bool:
    """Return whether x is on a CPU and not being traced for export."""
    return type(x) is Tensor and x.is_cpu


def _threshold(pre: Tensor, threshold: Tensor | None) -> Tensor:
    return pre.relu() if threshold is None else pre * (pre > threshold)


@torch.no_grad()
def thresholded(sae: SAE, batches: Iterable[Tensor]) -> SAE:
    """Convert a top-k dictionary to jumprelu, with the one threshold at which as many features fire on average.

    batches: (N, D) activations of the site. Tokens on which more than 8 k features would fire count as 8 k.
    """
    if sae.activation != "topk":
        return sae
    kept = []
    count = 0
    for x in batches:
        n, _, _ = normalised(x.to(sae.encoder.dtype), sae.normalise)
        pre = torch.nn.functional.linear(n, sae.encoder, sae.bias)
        kept.append(pre.topk(min(8 * sae.k, pre.shape[-1]), dim=-1, sorted=False).values.flatten())
        count += x[..., 0].numel()
    if not count:
        raise PatchError("Thresholds need activations to be read from; the stream was empty.")
    values = torch.cat(kept).clamp_min_(0)
    at = values.kthvalue(values.numel() - count * sae.k + 1).values
    return replace(sae, activation="jumprelu", k=0, threshold=at.expand(len(sae.bias)).clone())


# ---- the edit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureConfig:
    """Config of a feature edit: which features, the operation on their activations, at which tokens."""

    __pydantic_config__ = STRICT

    site: str
    """Module path whose output (B, T, D) is edited"""
    features: tuple[int, ...]
    """Rows of the dictionary that are edited"""
    op: Op = "zero"
    """New activation for f: 0 (zero), value (clamp), min(f, value) (cap), f * value (scale), f + value (add; needs no
    encoder)"""
    tokens: Tokens = "all"
    """Tokens that are edited; token 0 is the class token. mask: the tensor `mask` (T,) is the weight of the edit per
    token"""
    activation: Activation = "relu"
    k: int = 0
    """Activation function and normalisation of the dictionary, with `k` of topk"""
    normalise: Normalise = "none"


@dataclass(frozen=True)
class FeatureEdit(Patch):
    """Patch that edits SAE features.

    tensors: decoder (S, D); encoder and bias (S, D), (S,), or of all features for topk (none for add); threshold (S,)
    for jumprelu; value (S,) except for zero; mask (T,) for tokens="mask".
    """

    Config = FeatureConfig
    config: FeatureConfig

    def __post_init__(self) -> None:
        c, t = self.config, self.tensors
        S = len(c.features)
        if not S:
            raise PatchError("This feature edit names no feature; it would do nothing.")
        if len(set(c.features)) != S or min(c.features) < 0:
            raise PatchError("Features must be different rows of the dictionary, 0 or more.")
        rows = t["encoder"].shape[0] if c.activation == "topk" and "encoder" in t else S
        need: dict[str, tuple[int, ...]] = {"decoder": (S,)}
        if c.op != "add":
            need |= {"encoder": (rows,), "bias": (rows,)}
            need |= {"threshold": (S,)} if c.activation == "jumprelu" else {}
            if c.activation == "topk" and max(c.features) >= rows:
                raise PatchError(f"This dictionary has {rows} features, so there is no feature {max(c.features)}.")
        need |= {"value": (S,)} if c.op != "zero" else {}
        for name, want in need.items():
            if name not in t or tuple(t[name].shape[:1]) != want:
                got = list(t[name].shape) if name in t else "missing"
                raise PatchError(f"op={c.op!r} on {S} features needs a tensor {name!r} of {want[0]} rows; it is {got}.")
        if (c.tokens == "mask") != ("mask" in t):
            raise PatchError("The tensor 'mask' (T,) and tokens='mask' belong together.")
        if not all(bool(v.isfinite().all()) for v in t.values()):
            raise PatchError("A feature edit holds a number that is not finite.")

    def narrowed(self, config: FeatureConfig) -> dict[str, Tensor]:
        """The tensors of the same edit with some of its features. Raises PatchError for one that it does not carry."""
        known = {feature: row for row, feature in enumerate(self.config.features)}
        if missing := [f for f in config.features if f not in known]:
            raise PatchError(f"This edit carries no feature {missing[0]}; it has {len(known)}: {list(known)[:20]}...")
        rows = torch.tensor([known[f] for f in config.features], device=self.tensors["decoder"].device)
        whole = {"mask", *(("encoder", "bias") if config.activation == "topk" else ())}
        return {name: t if name in whole else t[rows] for name, t in self.tensors.items()}

    def edits(self) -> list[Edit]:
        return [Act(self.config.site, self._rewrite())]

    def _rewrite(self) -> Callable[[Tensor, Inputs], Tensor]:
        c, step, mask = self.config, self._step(), self.tensors.get("mask")

        def fn(x: Tensor, _: Inputs) -> Tensor:  # x (B, T, D)
            if c.tokens == "all":
                return step(x)
            if c.tokens == "mask":
                assert mask is not None
                if mask.shape[0] != x.shape[1]:
                    raise PatchError(f"The mask is for {mask.shape[0]} tokens, but {c.site} has {x.shape[1]}.")
                return x + mask.to(x)[:, None] * (step(x) - x)
            at = slice(0, 1) if c.tokens == "cls" else slice(1, None)
            out = x.clone()
            out[:, at] = step(x[:, at])
            return out

        return fn

    def _step(self) -> Callable[[Tensor], Tensor]:
        """Build the edit x (..., D) -> x' (..., D), one product each with the chosen encoder and decoder rows."""
        c, t = self.config, self.tensors
        decoder = t["decoder"]
        if c.op == "add":
            direction = t["value"] @ decoder  # (D,)

            def add(x: Tensor) -> Tensor:
                _, scale, _ = normalised(x, c.normalise)
                return x + scale * direction.to(x)

            return add
        codes = self._codes()
        # every op subtracts a sum over active features and adds a constant: x' = x - less(n) @ rows + constant
        rows: Tensor = decoder
        constant: Tensor | None = None
        cap: Tensor | None = None
        if c.op == "scale":
            rows = (1 - t["value"])[:, None] * decoder
        elif c.op == "clamp":
            constant = t["value"] @ decoder
        elif c.op == "cap":  # capped at a negative value, every feature is clamped
            constant, cap = t["value"].clamp_max(0) @ decoder, t["value"].clamp_min(0)

        def less(n: Tensor) -> Tensor:
            f = codes(n)
            return f if cap is None else (f - cap).relu()

        def edit(x: Tensor) -> Tensor:
            h = x.to(decoder.dtype)
            n, scale, _ = normalised(h, c.normalise)
            flat = n.reshape(-1, n.shape[-1])
            if isinstance(scale, Tensor):
                gone = (less(flat) @ rows).view_as(h)
                return (h - scale * (gone if constant is None else gone - constant)).to(x.dtype)
            out = torch.addmm(flat, less(flat), rows, alpha=-1).view_as(h)
            return (out if constant is None else out + constant).to(x.dtype)

        return edit

    def _codes(self) -> Callable[[Tensor], Tensor]:
        """Build the function from n (N, D) to the activations (N, S) of the chosen features."""
        c, t = self.config, self.tensors
        encoder, bias, threshold = t["encoder"], t["bias"], t.get("threshold")
        linear = torch.nn.functional.linear
        if c.activation != "topk":
            if threshold is not None and bool((threshold != threshold[0]).any()):
                return lambda n: _threshold(linear(n, encoder, bias), threshold)
            # a single threshold, as from `thresholded`, allows one in-place pass instead of two
            at = 0.0 if threshold is None else float(threshold[0])
            return lambda n: torch.threshold_(linear(n, encoder, bias), at, 0.0)
        chosen = torch.tensor(c.features, device=encoder.device)

        def some(n: Tensor) -> Tensor:
            pre = linear(n, encoder, bias)
            mine = pre.index_select(1, chosen)  # ten times as fast as pre[:, chosen]
            return mine * (mine >= kth_largest(pre, c.k).clamp_min(0))

        def codes(n: Tensor) -> Tensor:
            if not _plain(n) or len(n) <= ROWS:
                return some(n)
            return torch.cat([some(part) for part in n.split(ROWS)])

        return codes


def edit(
    sae: SAE,
    site: str,
    features: Sequence[int],
    op: Op = "zero",
    value: Tensor | float = 0.0,
    tokens: Tokens = "all",
    mask: Tensor | None = None,
) -> FeatureEdit:
    """Build the patch that changes the activations of `features` of `sae` at `site`; it carries only the rows it needs.

    value: one number, or (S,). Raises PatchError for a feature the dictionary does not have.
    """
    F = len(sae.bias)
    features = tuple(int(j) for j in features)
    if wrong := [j for j in features if not 0 <= j < F]:
        raise PatchError(f"This dictionary has features 0 to {F - 1}, so there is no feature {wrong[0]}.")
    rows = torch.tensor(features, dtype=torch.long, device=sae.decoder.device)
    tensors = {"decoder": sae.decoder[rows]}
    if op != "add":
        whole = sae.activation == "topk"
        tensors |= {
            "encoder": sae.encoder if whole else sae.encoder[rows],
            "bias": sae.bias if whole else sae.bias[rows],
        }
        if sae.threshold is not None:
            tensors["threshold"] = sae.threshold[rows]
    if op != "zero":
        tensors["value"] = torch.as_tensor(value).to(sae.decoder).expand(len(features)).clone()
    if mask is not None:
        tensors["mask"] = mask.to(sae.decoder)
    return FeatureEdit(FeatureConfig(site, features, op, tokens, sae.activation, sae.k, sae.normalise), tensors)


def describe(config: FeatureConfig) -> dict[str, Any]:
    """Summarise the patch for people and tags."""
    few = ", ".join(map(str, config.features[:8])) + (", ..." if len(config.features) > 8 else "")
    return {"op": config.op, "site": config.site, "features": f"{len(config.features)}: {few}", "tokens": config.tokens}
