"""Direct contributions to CLIP's image embedding: decompose it exactly into every head, source patch and MLP.

    y = P^T LN(z),  z = embedding + sum_l (sum_h sum_s A_0s W_O^h v_s + b_O) + sum_l mlp_l,   all at the class token

With the statistics of the last LayerNorm frozen, y is linear in the terms of z. Gandelsman, Efros, Steinhardt, arXiv
2310.05916, section 3. Two ways to distribute the mean that LayerNorm subtracts:

- `own`: every term is centred by its own mean over features. Exactly linear for any set of terms; the constants
  (LayerNorm's bias, every out_proj's bias) are separate, in `bias`.
- `apportioned`: as in the authors' code. Each of the 2L + 1 components loses the same share of the stream's mean and
  gets the same share of LayerNorm's bias; a layer's heads share theirs, and its out_proj's bias, equally. For parity
  with published figures; single heads differ by some per cent from `own`.

Only row 0 of the attention is computed, from one query and the keys' weights, and maps against a text need no k-vector
per patch: they are A_0s <v_s, M t>. If patches are applied, the patched forward is decomposed.

Shapes: B images, L layers, H heads, T tokens (the class token first), D width, e = D / H, k joint space, n texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patches.engine.read import record
from patches.families import clip
from patches.families.base import Base
from registry.errors import Invalid, NotFound

Share = Literal["own", "apportioned"]


# ---- from the stream to the embedding ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Readout:
    """Readout of the residual stream: last LayerNorm with frozen statistics, then projection.

    y = z @ map / sigma(z) + bias.

    A vector r added to the class token's last stream adds r @ map / sigma to y, while sigma stays frozen. float32 (or
    float64 if the base is), whatever the base's dtype.
    """

    map: Tensor
    """(D, k) = C diag(gain) P, where C = I - 11^T / D centres a vector"""
    plain: Tensor
    """(D, k) = diag(gain) P, without centring"""
    bias: Tensor
    """(k,) = LayerNorm's bias @ P"""
    eps: float

    def sigma(self, z: Tensor) -> Tensor:
        """Compute LayerNorm's denominator (...) for streams z (..., D)."""
        z = full(z)
        return ((z - z.mean(-1, keepdim=True)).square().mean(-1) + self.eps).sqrt()

    def __call__(self, r: Tensor, sigma: Tensor) -> Tensor:
        """Map terms r (B, ..., D) of the stream to their contributions (B, ..., k) to y under sigma (B,)."""
        return full(r) @ self.map / sigma.reshape(-1, *[1] * (r.ndim - 1))


def readout(base: Base) -> Readout:
    """Build the readout of a base. Raises NotFound naming the architecture and what it lacks."""
    visual = _visual(base)
    gain, P, beta = (full(p.detach()) for p in (visual.ln_post.weight, visual.proj, visual.ln_post.bias))
    plain = gain[:, None] * P
    return Readout(plain - plain.mean(0), plain, beta @ P, visual.ln_post.eps)


def full(x: Tensor) -> Tensor:
    """Cast to at least float32, which sums of hundreds of terms and variances need."""
    return x if x.dtype == torch.float64 else x.float()


def _visual(base: Base) -> Any:
    model, name = base.model, type(base.model).__name__
    visual = getattr(model, "visual", None)
    if visual is None:
        raise NotFound(f"{name} has no image tower `visual`, so its embedding has no direct effects. Load a CLIP.")
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    reasons = {
        "a transformer with resblocks": not blocks,
        "ln_post and a projection `proj`": not isinstance(getattr(visual, "ln_post", None), nn.LayerNorm)
        or getattr(visual, "proj", None) is None,
        "pooling of the class token after ln_post": getattr(visual, "attn_pool", None) is not None
        or getattr(visual, "pool_type", "tok") != "tok"
        or getattr(visual, "final_ln_after_pool", False),
        "attention whose parts can be read (patches.families.clip.Attention)": any(
            not isinstance(b.attn, clip.Attention) for b in blocks or ()
        ),
        "blocks that add what attention and MLP give (it has LayerScale)": any(
            not isinstance(getattr(b, n, nn.Identity()), nn.Identity) for b in blocks or () for n in ("ls_1", "ls_2")
        ),
    }
    if lacking := next((what for what, yes in reasons.items() if yes), None):
        raise NotFound(f"{name} with {type(visual).__name__} is not supported: it lacks {lacking}.")
    return visual


# ---- the decomposition -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parts:
    """Additive decomposition of B embeddings before normalisation: y = the sum of all fields but `patches`."""

    heads: Tensor
    """(B, L, H, k) contribution of each head, summed over source tokens, after patches of the site `heads`"""
    mlps: Tensor
    """(B, L + 1, k): index 0 the class token's embedding before block 0, i + 1 the MLP of block i, bias included"""
    bias: Tensor
    """(B, k) constants of the model; zero if apportioned"""
    rest: Tensor
    """(B, k) remainder: what patches of whole blocks added, else rounding error"""
    y: Tensor
    """(B, k) embedding before normalisation"""
    sigma: Tensor
    """(B,) denominator of the last LayerNorm"""
    patches: dict[int, Tensor]
    """Layer -> (B, H, T, k): a head's contribution by source token, before patches of the site `heads`; for the layers
    asked for"""

    @property
    def norm(self) -> Tensor:
        """(B,) norm of y: contributions divided by it add up to the unit embedding."""
        return self.y.norm(dim=-1)

    @property
    def sum(self) -> Tensor:
        """(B, k) sum of all contributions except the remainder."""
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.bias


@dataclass(frozen=True, eq=False)
class Maps:
    """Heads' contributions to texts' scores, by source token."""

    said: Tensor
    """(B, l, H, n, T) contribution to <y, t>; the class token first"""
    pattern: Tensor
    """(B, l, H, T) attention of the class token"""
    y: Tensor
    """(B, k) embedding before normalisation"""
    layers: tuple[int, ...]


class Lens:
    """Precomputed maps of a base from each head's output to the embedding, for decomposing images."""

    def __init__(self, base: Base) -> None:
        """Precompute the readout and the heads' maps. Raises NotFound naming the architecture and what it lacks."""
        self.base, self.readout = base, readout(base)
        self.attn: list[Any] = [b.attn for b in _visual(base).transformer.resblocks]
        self.layers, self.heads = len(self.attn), int(self.attn[0].heads)
        self.out = torch.stack([full(a.out_proj.weight.detach()).T.unflatten(0, (self.heads, -1)) for a in self.attn])
        """(L, H, e, D) map from a head's output to the residual stream"""
        zero = self.readout.map.new_zeros(self.out.shape[-1])
        biases = [a.out_proj.bias for a in self.attn]
        self.out_bias = torch.stack([zero if b is None else full(b.detach()) for b in biases])
        """(L, D) bias of each output projection"""
        self.ways = self.out @ self.readout.map
        """(L, H, e, k) map from a head's output to sigma times its contribution to the embedding"""

    @torch.no_grad()
    def read(self, images: Tensor, patches: Sequence[int] = (), share: Share = "own") -> Parts:
        """Decompose the embeddings of preprocessed images (B, 3, h, w) in one forward.

        patches: layers to split by source token.

        Memory: B L H k, and B H T k for each layer of `patches`.
        """
        model, first = self.base.model, partial(_token, 0)
        self.check(patches)
        heads, mlps, values = ([clip.site(n, i) for i in range(self.layers)] for n in ("heads", "mlp", "values"))
        embed, post = clip.site("embed"), clip.site("ln_post")
        with ExitStack() as stack:
            z = stack.enter_context(record(model, heads, "input", first))
            added = stack.enter_context(record(model, [embed, *mlps], keep=first))
            end = stack.enter_context(record(model, [post], "input", first))
            rows = {i: self._row(stack, i) for i in patches}
            read = stack.enter_context(record(model, [values[i] for i in patches], keep=full))
            y = self._embed(images)
        given = torch.stack([full(z[s][0]).unflatten(-1, (self.heads, -1)) for s in heads], 1)  # (B, L, H, e)
        stream = torch.stack([full(added[s][0]) for s in (embed, *mlps)], 1)  # (B, L + 1, D)
        last = full(end[post][0])
        sigma = self.readout.sigma(last)
        per = sigma[:, None, None]
        way = self.readout.map if share == "own" else self.readout.plain
        ways = self.ways if share == "own" else self.out @ way
        by_head = torch.einsum("blhe,lhek->blhk", given, ways) / per[..., None]
        by_mlp = stream @ way / per
        by_patch = {i: (rows[i]() / per)[..., None] * (read[values[i]][0] @ ways[i]) for i in patches}
        constant = self.out_bias @ way / per  # (B, L, k)
        if share == "own":
            bias = constant.sum(1) + self.readout.bias
        else:
            mean = last.mean(-1, keepdim=True) / sigma[:, None]
            each = (self.readout.bias - mean * way.sum(0)) / (2 * self.layers + 1)  # (B, k)
            by_layer = (constant + each[:, None]) / self.heads
            by_head, by_mlp, bias = by_head + by_layer[:, :, None], by_mlp + each[:, None], torch.zeros_like(each)
            by_patch = {i: c + by_layer[:, i, None, None] / c.shape[2] for i, c in by_patch.items()}
        rest = y - (by_head.sum((1, 2)) + by_mlp.sum(1) + bias)
        return Parts(by_head, by_mlp, bias, rest, y, sigma, by_patch)

    @torch.no_grad()
    def maps(self, images: Tensor, texts: Tensor, layers: Sequence[int] | None = None) -> Maps:
        """Compute what every head of `layers` (default all) contributes to <y, t> by source token, for texts t.

        images (B, 3, h, w), texts (n, k). Costs little more than one forward: no joint-space vector per patch is
        formed. Centring as in `own`.
        """
        model = self.base.model
        layers = list(range(self.layers) if layers is None else layers)
        self.check(layers)
        w = self.ways[layers] @ full(texts).to(self.ways).T  # (l, H, e, n)
        said: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            end = stack.enter_context(record(model, [clip.site("ln_post")], "input", partial(_token, 0)))
            rows = [self._row(stack, i) for i in layers]
            for n, i in enumerate(layers):
                said |= stack.enter_context(record(model, [clip.site("values", i)], keep=partial(_said, w[n])))
            y = self._embed(images)
        sigma = self.readout.sigma(end[clip.site("ln_post")][0])
        A = torch.stack([row() for row in rows], 1)  # (B, l, H, T)
        terms = torch.stack([v[0] for v in said.values()], 1)  # (B, l, H, n, T)
        return Maps(terms * (A / sigma[:, None, None, None])[:, :, :, None], A, y, tuple(layers))

    def check(self, layers: Sequence[int]) -> None:
        """Check layer numbers. Raises Invalid for one that does not exist or is named twice."""
        if bad := [i for i in layers if not 0 <= i < self.layers]:
            raise Invalid(f"There is no layer {bad[0]}; this tower has 0 to {self.layers - 1}.")
        if len(set(layers)) < len(layers):
            raise Invalid(f"Layers {list(layers)} must be different ones.")

    def _row(self, stack: ExitStack, layer: int) -> Callable[[], Tensor]:
        """Prepare to read a layer's class-token attention (B, H, T); the returned function gives it afterwards."""
        attn, model = self.attn[layer], self.base.model
        pattern, site = clip.site("pattern", layer), clip.site("attn", layer)
        if attn.pattern._forward_hooks:  # a patch rewrites the pattern, so it is computed in full anyway
            got = stack.enter_context(record(model, [pattern], keep=lambda a: full(a[:, :, 0])))
            return lambda: got[pattern][0]
        seen = stack.enter_context(record(model, [site], "input", partial(_looks, attn)))
        return lambda: seen[site][0]

    def _embed(self, images: Tensor) -> Tensor:
        """Compute embeddings (B, k) before normalisation, through the root, where applied patches find their rows."""
        model = self.base.model
        with record(model, ["visual"]) as out:
            model(image=images.to(self.base.device, model.visual.proj.dtype))
        return full(out["visual"][0])


def _token(at: int, x: Tensor) -> Tensor:
    return x[:, at].clone()  # a copy: a view would keep every token alive


def _looks(attn: clip.Attention, x: Tensor) -> Tensor:
    """Compute token 0's attention (B, H, T) from the module's input (B, T, D).

    The keys' bias shifts all logits equally, so it is left out.
    """
    d, H = x.shape[-1], attn.heads
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    q = nn.functional.linear(x[:, 0], weight[:d], None if bias is None else bias[:d]).unflatten(-1, (H, -1))
    key = torch.einsum("bhe,hed->bhd", q, weight[d : 2 * d].unflatten(0, (H, -1)))
    logits: Tensor = key @ x.mT * (d // H) ** -0.5
    return full(logits).softmax(-1)


def _said(w: Tensor, v: Tensor) -> Tensor:
    """Contract values v (B, H, T, e) with w (H, e, n) to (B, H, n, T)."""
    return (full(v) @ w).mT
