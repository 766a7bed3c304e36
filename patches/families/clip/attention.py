"""Attention with hookable heads, values and pattern, which replaces nn.MultiheadAttention in open_clip models."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention with the parameters of nn.MultiheadAttention whose every intermediate can be hooked.

    torch's own module calls no submodule that a hook could sit on. `pattern` is computed only while it is hooked,
    beside the fused kernel.
    """

    def __init__(self, stock: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = stock.num_heads
        self.in_proj_weight, self.in_proj_bias = stock.in_proj_weight, stock.in_proj_bias
        self.out_proj = stock.out_proj
        self.values, self.pattern = nn.Identity(), nn.Identity()

    def forward(
        self, x: Tensor, keys: Tensor, *_: Tensor, attn_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Attend from queries x (B, T, D) to keys (B, S, D); returns (B, T, D).

        keys are x itself, or all tokens if x is a subset of them; attn_mask (T, S) is additive.
        """
        w, b, width = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if keys is x:
            q, k, v = F.linear(x, w, b).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        else:
            q = F.linear(x, w[:width], b[:width]).unflatten(-1, (self.heads, -1))
            k, v = F.linear(keys, w[width:], b[width:]).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), self.values(v.transpose(1, 2))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        if self.pattern._forward_hooks or self.pattern._forward_pre_hooks:
            logits = q @ k.mT * q.shape[-1] ** -0.5
            pattern = (logits if attn_mask is None else logits + attn_mask).softmax(-1)
            if (edited := self.pattern(pattern)) is not pattern:
                z = z + (edited - pattern) @ v  # unedited rows keep the kernel's bits
        return self.out_proj(z.transpose(1, 2).flatten(2)), None


def explicit_attention(model: nn.Module) -> nn.Module:
    """Replace every nn.MultiheadAttention of both towers by `Attention`, in place; parameters and their names stay."""
    for block in _blocks(model):
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = Attention(block.attn).train(block.training)
    return model


def _blocks(model: Any) -> list[Any]:
    """Return the transformer blocks of both towers."""
    return [*model.visual.transformer.resblocks, *model.transformer.resblocks]
