"""Attribute directions in coefficients, and how well coefficients tell attributes: probes with shuffled controls.

Coefficients are in standard deviations of the population, so their covariance is the identity. Directions: `mean`
(those with minus those without; in these units it is also the least-squares solution), `paper` (least squares on
raw coefficients, which is the mean difference divided by std^2), `ridge` (a shrunk discriminant), `orthogonal`
(the mean differences with every other attribute's projected out, from one joint pseudo-inverse), `partial` (what an
attribute adds to coefficients while the others stay: a regression of coefficients on all labels at once), and
`sparse` (the same without the coefficients whose effect is within two standard errors of nothing).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from registry.errors import ConfigError
from registry.measure import Measure

METHODS = ("mean", "paper", "ridge", "orthogonal", "partial", "sparse")
NOISE = 2.0
"""standard errors within which `sparse` takes an effect for nothing"""


def classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) bool masks of the members with and without: binary labels as they are, continuous by outer thirds."""
    if bool(((labels == 0) | (labels == 1)).all()):
        return labels > 0.5, labels <= 0.5
    low, high = labels.quantile(1 / 3), labels.quantile(2 / 3)
    return labels >= high, labels <= low


def directions(
    z: Tensor, labels: Tensor, std: Tensor, method: str, names: Sequence[str] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """(k, m) unit directions, (k,) gaps, (k, 2) reach, from z (N, m) and labels (N, k).

    gap: how far the two classes' means lie apart along the direction; a strength of 1 moves that far. reach: smallest
    and largest projection of a member. Raises ConfigError for an attribute that all members share.
    """
    if method not in METHODS:
        raise ConfigError(f"There is no direction {method[:40]!r}. Directions: {', '.join(METHODS)}.")
    apart = []
    for i in range(labels.shape[1]):
        yes, no = classes(labels[:, i])
        if int(yes.sum()) < 2 or int(no.sum()) < 2:
            name = names[i] if names else str(i)
            raise ConfigError(
                f"{name}: {int(yes.sum())} members with it and {int(no.sum())} without; two of each are needed."
            )
        apart.append(z[yes].mean(0) - z[no].mean(0))
    difference = torch.stack(apart)  # (k, m)
    d = {
        "mean": lambda: difference,
        "paper": lambda: difference / std.square(),
        "ridge": lambda: _ridge(z, labels),
        "orthogonal": lambda: torch.linalg.pinv(difference).T,
        "partial": lambda: _effects(z, labels)[0],
        "sparse": lambda: _sparse(*_effects(z, labels), difference),
    }[method]()
    d = d / d.norm(dim=1, keepdim=True).clamp(min=1e-12)
    gap = (d * difference).sum(1)
    d, gap = d * gap.sign()[:, None], gap.abs().clamp(min=1e-6)
    along = z @ d.T
    return d, gap, torch.stack([along.amin(0), along.amax(0)], 1)


def _effects(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(k, m) coefficients of the regression z = labels B + constant, and their standard errors."""
    x = (labels - labels.mean(0)).double()
    y = (z - z.mean(0)).double()
    inner = torch.linalg.pinv(x.T @ x)
    effect = inner @ x.T @ y
    left = (y - x @ effect).square().sum(0) / max(1, len(x) - x.shape[1] - 1)
    error = (inner.diagonal()[:, None] * left).sqrt()
    return effect.float(), error.float()


def _sparse(effect: Tensor, error: Tensor, difference: Tensor) -> Tensor:
    """Effects (k, m) beyond NOISE standard errors; of an attribute that has none, all of them."""
    kept = torch.where(effect.abs() > NOISE * error, effect, torch.zeros_like(effect))
    found: Tensor = torch.where((kept != 0).any(1)[:, None], kept, difference)
    return found


def _ridge(z: Tensor, labels: Tensor) -> Tensor:
    return ridge(z, labels - labels.mean(0), len(z) / 4).T


def ridge(z: Tensor, y: Tensor, strength: float) -> Tensor:
    """(m, k) least squares with a penalty, in units of one observation."""
    inner: Tensor = z.T @ z + strength * torch.eye(z.shape[1])
    return torch.linalg.solve(inner, z.T @ y)


def warm_start(latents: Tensor, z: Tensor, strengths: Sequence[float] = (1, 10, 100, 1000), folds: int = 4) -> Tensor:
    """(p + 1, m) ridge map from a picture's latents (N, p) to coefficients (N, m), its penalty chosen by folds."""
    x = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    fold = torch.arange(len(x)) % folds

    def error(strength: float) -> float:
        total = 0.0
        for k in range(folds):
            w = _solve(x[fold != k], z[fold != k], strength)
            total += float((x[fold == k] @ w - z[fold == k]).square().sum())
        return total

    return _solve(x, z, min(strengths, key=error))


def _solve(x: Tensor, y: Tensor, strength: float) -> Tensor:
    penalty = strength * torch.eye(x.shape[1])
    penalty[-1, -1] = 0.0  # the intercept is free
    out: Tensor = torch.linalg.solve(x.T @ x + penalty + 1e-6 * torch.eye(len(penalty)), x.T @ y)
    return out


# ---- probes --------------------------------------------------------------------------------------------------------


def auc(score: Tensor, yes: Tensor) -> float:
    """Probability that one with the attribute scores higher than one without."""
    a, b = score[yes], score[~yes]
    if not len(a) or not len(b):
        return float("nan")
    return float(((a[:, None] > b[None]).float() + 0.5 * (a[:, None] == b[None]).float()).mean())


def probe(z: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, strength: float = 10.0) -> Tensor:
    """(n, k) what a ridge probe fitted on z, labels says of held-out coefficients (n, m)."""
    w = ridge(z, labels - labels.mean(0), strength)
    return held @ w + labels.mean(0)


def probe_auc(
    z: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, binary: Sequence[int], draws: int = 400
) -> tuple[Measure, dict[int, float]]:
    """Mean AUC of the binary attributes on held-out models, with a bootstrap interval over those models, and each."""
    said = probe(z, labels, held, held_labels)
    each = {i: v for i in binary if (v := auc(said[:, i], held_labels[:, i] > 0.5)) == v}
    if not each:  # nobody held out differs in any attribute
        return Measure(0.5, 0.0, 1.0, 0), each
    g, means = Generator().manual_seed(0), []
    for _ in range(draws):
        k = torch.randint(0, len(held), (len(held),), generator=g)
        values = torch.tensor([auc(said[k, i], held_labels[k, i] > 0.5) for i in binary])
        if not bool(values.isnan().all()):
            means.append(float(values.nanmean()))
    low, high = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Measure(sum(each.values()) / len(each), low, high, len(held)), each


def shuffled_auc(
    z: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, binary: Sequence[int], draws: int = 20
) -> float:
    """The control: mean AUC of probes fitted on labels that were dealt to other models."""
    g, out = Generator().manual_seed(1), []
    for _ in range(draws):
        said = probe(z, labels[torch.randperm(len(labels), generator=g)], held, held_labels)
        out += [v for i in binary if (v := auc(said[:, i], held_labels[:, i] > 0.5)) == v]
    return sum(out) / len(out) if out else 0.5


def explained(said: Tensor, labels: Tensor) -> float:
    """R2 of a continuous attribute."""
    return float(1 - (said - labels).square().mean() / labels.var(unbiased=False).clamp(min=1e-9))


def mutual_cosine(d: Tensor) -> float:
    """Mean |cos| between different directions (k, m): the paper's measure of entanglement."""
    if len(d) < 2:
        return 0.0
    c = torch.nn.functional.normalize(d, dim=1)
    c = (c @ c.T).abs()
    return float((c.sum() - c.diagonal().sum()) / (len(d) * (len(d) - 1)))
