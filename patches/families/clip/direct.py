"""What each part of CLIP's image tower adds to the embedding directly: every head, every patch a head reads, every MLP.

    y = P^T LN(z),  z = embedding + sum_l (sum_h sum_s A_0s W_O^h v_s + b_O) + sum_l mlp_l,   all at the class token

With the statistics of the last LayerNorm frozen, y is linear in the terms of z. Gandelsman, Efros, Steinhardt,
arXiv 2310.05916, section 3. Two ways to share the mean that LayerNorm takes away:

- `own`: every term loses its own mean over features. Exactly linear, whatever else is counted; the constants
  (LayerNorm's bias, every out_proj's bias) stand apart in `bias`.
- `apportioned`: as in the authors' code. Each of the 2L + 1 components loses the same share of the stream's mean and
  gets the same share of LayerNorm's bias; a layer's heads share theirs, and its out_proj's bias, alike. For parity with
  published figures; single heads differ by some per cent from `own`.

Only row 0 of the attention is formed, from the one query and the keys' weights, and for a map against a text no
k-vector per patch: that is A_0s <v_s, M t>. A forward under patches is read as it is.

Shapes: B pictures, L layers, H heads, T tokens (the class token first), D width, e = D / H, k joint space, n texts.
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
    """The last LayerNorm with its statistics frozen, and the projection: y = z @ map / sigma(z) + bias.

    A vector r added to the class token's last stream adds r @ map / sigma to y, while sigma stays frozen. float32 (or
    float64 if the base is), whatever the base's own type.
    """

    map: Tensor
    """(D, k) = C diag(gain) P, C = I - 11^T / D takes a vector's own mean away"""
    plain: Tensor
    """(D, k) = diag(gain) P: the same without C"""
    bias: Tensor
    """(k,) = LayerNorm's bias @ P"""
    eps: float

    def sigma(self, z: Tensor) -> Tensor:
        """(...) the deviation that LayerNorm divides streams z (..., D) by."""
        z = full(z)
        return ((z - z.mean(-1, keepdim=True)).square().mean(-1) + self.eps).sqrt()

    def __call__(self, r: Tensor, sigma: Tensor) -> Tensor:
        """(B, ..., k) that terms r (B, ..., D) add to y under sigma (B,)."""
        return full(r) @ self.map / sigma.reshape(-1, *[1] * (r.ndim - 1))


def readout(base: Base) -> Readout:
    """Raises NotFound with the architecture's name and what it lacks."""
    visual = _visual(base)
    gain, P, beta = (full(p.detach()) for p in (visual.ln_post.weight, visual.proj, visual.ln_post.bias))
    plain = gain[:, None] * P
    return Readout(plain - plain.mean(0), plain, beta @ P, visual.ln_post.eps)


def full(x: Tensor) -> Tensor:
    """At least float32: sums of hundreds of terms and variances need it."""
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
    """What adds up to the embeddings of B pictures, before they are normalised: y = sum of all but `patches`."""

    heads: Tensor
    """(B, L, H, k) over all tokens a head reads, as it is after patches of the site `heads`"""
    mlps: Tensor
    """(B, L + 1, k): 0 is the class token before block 0, i + 1 the MLP of block i, bias and all"""
    bias: Tensor
    """(B, k) constants of the model; zeros if apportioned"""
    rest: Tensor
    """(B, k) what none of the above is: what patches of whole blocks added, else rounding"""
    y: Tensor
    """(B, k) the embedding, not normalised"""
    sigma: Tensor
    """(B,) of the last LayerNorm"""
    patches: dict[int, Tensor]
    """layer -> (B, H, T, k): a head's term by the token it reads, before patches of the site `heads`; the layers asked
    for"""

    @property
    def norm(self) -> Tensor:
        """(B,) of y: divided by it, terms add up to the unit embedding."""
        return self.y.norm(dim=-1)

    @property
    def sum(self) -> Tensor:
        """(B, k) of everything that has a name."""
        return self.heads.sum((1, 2)) + self.mlps.sum(1) + self.bias


@dataclass(frozen=True, eq=False)
class Maps:
    """What heads say of texts, by the token they read."""

    said: Tensor
    """(B, l, H, n, T) added to <y, t>; the class token's own first"""
    pattern: Tensor
    """(B, l, H, T) the class token's attention"""
    y: Tensor
    """(B, k) the embedding, not normalised"""
    layers: tuple[int, ...]


class Lens:
    """What is worth computing once for a base: the readout, and each head's way through it."""

    def __init__(self, base: Base) -> None:
        """Raises NotFound with the architecture's name and what it lacks."""
        self.base, self.readout = base, readout(base)
        self.attn: list[Any] = [b.attn for b in _visual(base).transformer.resblocks]
        self.layers, self.heads = len(self.attn), int(self.attn[0].heads)
        self.out = torch.stack([full(a.out_proj.weight.detach()).T.unflatten(0, (self.heads, -1)) for a in self.attn])
        """(L, H, e, D): what a head gives -> the stream"""
        zero = self.readout.map.new_zeros(self.out.shape[-1])
        biases = [a.out_proj.bias for a in self.attn]
        self.out_bias = torch.stack([zero if b is None else full(b.detach()) for b in biases])
        """(L, D)"""
        self.ways = self.out @ self.readout.map
        """(L, H, e, k): what a head gives -> sigma times what it adds to the embedding"""

    @torch.no_grad()
    def read(self, images: Tensor, patches: Sequence[int] = (), share: Share = "own") -> Parts:
        """images (B, 3, h, w) as the processor makes them, one forward. patches: layers to tell by patch.

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
        """What every head of `layers` (default all) adds to <y, t> by the token it reads, for each row t of `texts`.

        images (B, 3, h, w), texts (n, k). One forward and little more: no vector of the joint space is formed. Shares
        the mean as `own`.
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
        """Raises Invalid for a layer there is not, or one that is named twice."""
        if bad := [i for i in layers if not 0 <= i < self.layers]:
            raise Invalid(f"There is no layer {bad[0]}; this tower has 0 to {self.layers - 1}.")
        if len(set(layers)) < len(layers):
            raise Invalid(f"Layers {list(layers)} must be different ones.")

    def _row(self, stack: ExitStack, layer: int) -> Callable[[], Tensor]:
        """What will give the class token's attention (B, H, T) of a layer once the forward has run."""
        attn, model = self.attn[layer], self.base.model
        pattern, site = clip.site("pattern", layer), clip.site("attn", layer)
        if attn.pattern._forward_hooks:  # a patch rewrites it, so it is formed whole in any case
            got = stack.enter_context(record(model, [pattern], keep=lambda a: full(a[:, :, 0])))
            return lambda: got[pattern][0]
        seen = stack.enter_context(record(model, [site], "input", partial(_looks, attn)))
        return lambda: seen[site][0]

    def _embed(self, images: Tensor) -> Tensor:
        """(B, k) embeddings that are not normalised; through the root, where applied patches find their rows."""
        model = self.base.model
        with record(model, ["visual"]) as out:
            model(image=images.to(self.base.device, model.visual.proj.dtype))
        return full(out["visual"][0])


def _token(at: int, x: Tensor) -> Tensor:
    return x[:, at].clone()  # not a view, which would keep every token alive


def _looks(attn: clip.Attention, x: Tensor) -> Tensor:
    """(B, H, T) attention of token 0 from what enters the module (B, T, D). The keys' bias moves all logits alike."""
    d, H = x.shape[-1], attn.heads
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    q = nn.functional.linear(x[:, 0], weight[:d], None if bias is None else bias[:d]).unflatten(-1, (H, -1))
    key = torch.einsum("bhe,hed->bhd", q, weight[d : 2 * d].unflatten(0, (H, -1)))
    logits: Tensor = key @ x.mT * (d // H) ** -0.5
    return full(logits).softmax(-1)


def _said(w: Tensor, v: Tensor) -> Tensor:
    """(B, H, n, T) of values v (B, H, T, e) and w (H, e, n)."""
    return (full(v) @ w).mT
