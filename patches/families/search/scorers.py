"""Scorers: how well texts fit an item. One contract; features of texts are kept, so that a text is encoded once.

    CLIP on a picture, or over the frames of a clip      Clip, inputs {"pixels": (T, 3, H, W)}
    sums of pictures and words in CLIP's space           Clip, inputs {"plus": [...], "minus": [...]}
    CLAP on a sound                                      Clap, inputs {"sound": (samples,)}
    a picture and a sound together                       Both
    how well what a prompt draws fits another prompt     Preference, inputs {"goal": text}
    how much an edited picture looks like another        Style, inputs {"style": pixels, "content": pixels}

Texts are encoded in batches of one shape, whatever is asked for, so that a text's features do not depend on which texts
came with it; products with targets are formed in float64. Both make a trace independent of how items were batched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patches.engine.patch import Applied
from patches.families.base import Base
from registry.errors import Invalid

BATCH = 32
"""texts in one forward, always"""
MAX_TEXTS = 200_000
"""texts whose features are kept; beyond that the older half is forgotten"""


@dataclass(frozen=True, eq=False)
class Target:
    """What the texts of one item are scored against."""

    vector: Tensor
    """(k,) float32 on the CPU"""
    scope: str = ""
    """features of texts belong to this item alone (edits of its picture); "" if they are everybody's"""
    content: Tensor | None = None
    """Style: what is edited"""


class Features:
    """Features (n, k) of texts by (scope, text); the newest MAX_TEXTS. Kept in numpy, which no inference mode marks."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], int] = {}
        self.table = np.zeros((0, 0), np.float32)

    def add(self, scope: str, texts: Sequence[str], features: Tensor) -> None:
        if len(self.rows) + len(texts) > MAX_TEXTS:
            self._forget()
        n, k = len(self.rows), features.shape[1]
        if n + len(texts) > len(self.table) or self.table.shape[1] != k:
            grown = np.zeros((max(1024, 2 * len(self.table), n + len(texts)), k), np.float32)
            if n:
                grown[:n] = self.table[:n]
            self.table = grown
        for text, row in zip(texts, features.numpy(), strict=True):
            at = self.rows.setdefault((scope, text), len(self.rows))
            self.table[at] = row

    def get(self, scope: str, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.table[[self.rows[scope, t] for t in texts]])

    def _forget(self) -> None:
        newer = list(self.rows.items())[len(self.rows) // 2 :]
        self.table = self.table[[at for _, at in newer]].copy()
        self.rows = {key: i for i, (key, _) in enumerate(newer)}

    def clear(self) -> None:
        self.rows.clear()


class Scorer(ABC):
    """Scores texts against targets; higher is better. One belongs to one thread."""

    def __init__(self) -> None:
        self.kept = Features()
        self.encoded = 0
        """texts that went through the encoder, ever"""

    @abstractmethod
    def target(self, inputs: Mapping[str, Any]) -> Target:
        """What an item's texts are scored against. Raises Invalid for inputs of another kind, naming them."""

    @abstractmethod
    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        """Features (n, k) float32, on the CPU, of at most BATCH texts."""

    def missing(self, target: Target, texts: Sequence[str]) -> list[str]:
        """The texts that were not encoded yet, each once."""
        return [t for t in dict.fromkeys(texts) if (target.scope, t) not in self.kept.rows]

    def fill(self, target: Target, texts: Sequence[str]) -> None:
        """Encode and keep at most BATCH texts: one bounded slice of work."""
        self.kept.add(target.scope, texts, self.encode(texts, target))
        self.encoded += len(texts)

    def score(self, target: Target, texts: Sequence[str]) -> list[float]:
        """Scores of texts whose features are kept."""
        if not texts:
            return []
        made: list[float] = self.compare(self.kept.get(target.scope, texts).double(), target).tolist()
        return made

    def compare(self, features: Tensor, target: Target) -> Tensor:
        """(n,) float64 scores of features (n, k) float64."""
        return features @ target.vector.double()

    def __call__(self, target: Target, texts: Sequence[str]) -> list[float]:
        """Scores of any texts, encoding what is missing."""
        missing = self.missing(target, texts)
        for i in range(0, len(missing), BATCH):
            self.fill(target, missing[i : i + BATCH])
        return self.score(target, texts)


class Clip(Scorer):
    """Cosine of a text and a picture, of a text and the mean of a clip's frames, or of a text and a sum."""

    def __init__(self, base: Base, applied: Applied | None = None, arm: str | None = None) -> None:
        super().__init__()
        self.base, self.applied, self.arm = base, applied, arm

    def target(self, inputs: Mapping[str, Any]) -> Target:
        if "pixels" in inputs:
            return Target(self.images(inputs["pixels"]))
        if "plus" in inputs:
            total = sum(self._part(p) for p in inputs["plus"]) - sum(self._part(p) for p in inputs.get("minus", ()))
            if float(torch.as_tensor(total).norm()) < 1e-4:
                raise Invalid("The sum of these parts is nothing: what is added is taken away again.")
            return Target(F.normalize(torch.as_tensor(total), dim=0))
        raise Invalid(
            f"This scorer looks at pictures and clips; it was given {', '.join(sorted(inputs)) or 'nothing'}."
        )

    def _part(self, part: Any) -> Tensor:
        return self.encode([part], Target(torch.zeros(0)))[0] if isinstance(part, str) else self.images(part)

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        """(k,) of unit norm: the mean of the embeddings of frames (T, 3, H, W), one at a time."""
        want = (3, *self.base.processor.size)
        if pixels.ndim != 4 or not len(pixels) or tuple(pixels.shape[1:]) != want or not bool(pixels.isfinite().all()):
            raise Invalid(f"Frames must be finite numbers of shape (T, {want[0]}, {want[1]}, {want[2]}), "
                          f"not {tuple(pixels.shape)}.")  # fmt: skip
        each = [self._forward(image=x[None].to(self.base.device, self.base.model.visual.proj.dtype)) for x in pixels]
        return F.normalize(torch.cat(each).mean(0), dim=0)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        padded = [*texts, *[texts[0]] * (BATCH - len(texts))]
        return self._forward(text=self.base.processor.text(padded).to(self.base.device))[: len(texts)]

    def _forward(self, **inputs: Tensor) -> Tensor:
        key = next(iter(inputs))
        if self.applied is None:
            out = self.base.model(**inputs)
        else:
            with self.applied.rows([self.arm] * len(inputs[key])):
                out = self.base.model(**inputs)
        features: Tensor = out[f"{key}_features"].float().cpu()
        return features


class Both(Scorer):
    """The sum of two scorers' cosines for one item, weighted; such as a picture and a sound."""

    def __init__(self, first: Scorer, second: Scorer, weights: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        self.parts, self.weights = (first, second), weights

    def target(self, inputs: Mapping[str, Any]) -> Target:
        """inputs: {"both": (inputs of the first, inputs of the second)}."""
        if "both" not in inputs:
            raise Invalid("This scorer wants two inputs, such as a picture and a sound.")
        made = [w * p.target(x).vector for w, p, x in zip(self.weights, self.parts, inputs["both"], strict=True)]
        return Target(torch.cat(made))

    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        return torch.cat([part.encode(texts, target) for part in self.parts], 1)


class Renderer(ABC):
    """Draws what a text says, or changes a picture as it says; the same text and seed draw the same picture."""

    batch = 8
    """texts drawn in one slice"""

    @abstractmethod
    def draw(self, texts: Sequence[str], picture: Tensor | None = None) -> Tensor:
        """(n, 3, H, W) uint8 of at most `batch` texts. picture (3, H, W) uint8: what is changed, for editors. Every
        text is drawn from the same noise, so that scores compare texts."""


class Preference(Clip):
    """How well the picture drawn from a candidate fits the prompt that is being rewritten (CLIP cosine)."""

    def __init__(
        self, base: Base, renderer: Renderer, applied: Applied | None = None, arm: str | None = None
    ) -> None:  # fmt: skip
        super().__init__(base, applied, arm)
        self.renderer = renderer

    def target(self, inputs: Mapping[str, Any]) -> Target:
        if not str(inputs.get("goal", "")).strip():
            raise Invalid("Say the prompt that is to be rewritten: goal.")
        return Target(super().encode([inputs["goal"]], Target(torch.zeros(0)))[0])

    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        drawn = [
            self.renderer.draw(texts[i : i + self.renderer.batch]) for i in range(0, len(texts), self.renderer.batch)
        ]
        return torch.stack([self.images(self.base.processor.image(x[None])) for x in torch.cat(drawn)])


class Style(Scorer):
    """Minus (1000 x the sum over blocks of the MSE of Gram matrices, plus the MSE of the content's features).

    Gram = F^T F / (tokens x width) of the patch tokens of an image tower's blocks, the content the tokens of one deep
    block: the measure of Gatys et al. on a transformer's features, for a CLIP has no VGG, which the paper uses.
    """

    GRAMS, CONTENT, WEIGHT = (0.0, 0.25, 0.5), 0.75, 1000.0
    """depths, as shares of the tower's blocks"""

    def __init__(self, base: Base, renderer: Renderer) -> None:
        super().__init__()
        self.base, self.renderer = base, renderer

    def target(self, inputs: Mapping[str, Any]) -> Target:
        if "style" not in inputs or "content" not in inputs:
            raise Invalid("Style transfer wants two pictures: content and style.")
        grams, _ = self.describe(inputs["style"][None])
        _, content = self.describe(inputs["content"][None])
        scope = str(inputs.get("key", hash(inputs["content"].numpy().tobytes())))
        return Target(torch.cat([grams[0], content[0]]), scope, inputs["content"])

    @torch.inference_mode()
    def describe(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled Gram matrices (n, G) and content features (n, C) of uint8 pictures; a sum of squares of differences
        of the first is 1000 times the sum of their MSEs, of the second the MSE."""
        blocks = self.base.model.visual.transformer.resblocks
        at = [int(d * len(blocks)) for d in (*self.GRAMS, self.CONTENT)]
        seen: dict[int, Tensor] = {}
        hooks = [
            blocks[i].register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out[:, 1:].float().cpu()))
            for i in at
        ]
        try:
            x = self.base.processor.image(pictures)
            self.base.model(image=x.to(self.base.device, self.base.model.visual.proj.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        grams = []
        for i in at[:-1]:
            gram = seen[i].mT @ seen[i] / seen[i].shape[1] / seen[i].shape[2]
            grams.append(gram.flatten(1) * (self.WEIGHT / gram[0].numel()) ** 0.5)
        content = seen[at[-1]].flatten(1)
        return torch.cat(grams, 1), content / content.shape[1] ** 0.5

    def encode(self, texts: Sequence[str], target: Target) -> Tensor:
        """(n, 2): both losses, so that little is kept of a text."""
        made, n = [], self.renderer.batch
        for i in range(0, len(texts), n):
            grams, content = self.describe(self.renderer.draw(texts[i : i + n], target.content))
            wanted = target.vector.split([grams.shape[1], content.shape[1]])
            made.append(
                torch.stack([(a - b).square().sum(1) for a, b in zip((grams, content), wanted, strict=True)], 1)
            )
        return torch.cat(made)

    def compare(self, features: Tensor, target: Target) -> Tensor:
        return -features.sum(1)
