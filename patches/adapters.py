"""LoRA adapters, in and out: a peft folder, a file in diffusers' layout, and the factors between them.

An `Adapter` holds, per module of a model, A (r, in) and B (out, r) with the scale alpha / r already inside B,
so nothing is lost on the way: a bare state dict given to diffusers sets alpha = r without a word, and the picture is
another one.

What is read is checked: every key must name a linear module of its model with fitting shapes, and every A needs
its B; a key that would be skipped in silence is refused. Only safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from registry.errors import BadArtifact, NotFound

PEFT, PEFT_CONFIG, DIFFUSERS = "adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"
PREFIXES = ("base_model.model.", "unet.", "transformer.", "denoiser.")
KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
METADATA = "lora_adapter_metadata"
"""where diffusers keeps an adapter's config in a file"""


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank updates of some modules: W + B @ A."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """module path inside the denoiser -> A (r, in), B (out, r) with the scale inside, float32"""

    @property
    def rank(self) -> int:
        return max((a.shape[0] for a, _ in self.factors.values()), default=0)

    def check(self, denoiser: nn.Module, where: str = "this adapter") -> None:
        """Raises BadArtifact unless every module is one of `denoiser` with fitting shapes and every number is
        finite."""
        modules = dict(denoiser.named_modules())
        for name, (a, b) in self.factors.items():
            weight = getattr(modules.get(name), "weight", None)
            if weight is None:
                raise BadArtifact(
                    f"{where} changes {name[:80]!r}, which this base does not have; it is another base's."
                )
            if weight.ndim != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
                raise BadArtifact(
                    f"{where}: {name} has {tuple(b.shape)} x {tuple(a.shape)} for a weight of {tuple(weight.shape)}; "
                    "it is another base's."
                )
            if not bool(a.isfinite().all() and b.isfinite().all()):
                raise BadArtifact(f"{where}: {name} holds NaN or infinity.")

    @torch.no_grad()
    def fold(self, denoiser: nn.Module, strength: float = 1.0) -> None:
        """Add the updates to the weights of `denoiser`, in place: use a copy."""
        self.check(denoiser)
        for name, (a, b) in self.factors.items():
            weight = denoiser.get_parameter(f"{name}.weight")
            weight.add_(strength * (b @ a).to(weight))


def read_adapter(path: Path, denoiser: nn.Module | None = None) -> Adapter:
    """An adapter from a peft folder, a folder or file in diffusers' layout. Raises NotFound, or BadArtifact as `check`.

    The scale comes from adapter_config.json, from the file's metadata, from `<module>.alpha` keys, or is 1 if nobody
    says.
    """
    from safetensors import safe_open

    file = path if path.is_file() else next((path / n for n in (PEFT, DIFFUSERS) if (path / n).is_file()), None)
    if file is None or file.suffix != ".safetensors":
        raise NotFound(f"{path} is no adapter: give a folder with {PEFT} or {DIFFUSERS}, or such a file.")
    with safe_open(file, "pt") as f:
        state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        about = json.loads((f.metadata() or {}).get(METADATA, "{}"))
    config = file.parent / PEFT_CONFIG
    if config.is_file():
        about = json.loads(config.read_text())
    adapter = _factors(state, {k.removeprefix("unet."): v for k, v in about.items()}, str(path))
    if denoiser is not None:
        adapter.check(denoiser, str(path))
    return adapter


def _factors(state: Mapping[str, Tensor], about: Mapping[str, object], where: str) -> Adapter:
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, x in state.items():
        bare = key
        while prefix := next((p for p in PREFIXES if bare.startswith(p)), ""):
            bare = bare.removeprefix(prefix)
        if bare.endswith(".alpha"):
            alphas[bare.removesuffix(".alpha")] = float(x)
            continue
        if (found := KEY.match(bare)) is None:
            raise BadArtifact(f"{where} holds {key[:80]!r}, which is no LoRA factor of a linear module.")
        sides.setdefault(found["module"], {})[found["side"]] = x.float()
    if not sides:
        raise BadArtifact(f"{where} holds no LoRA factors.")
    out = {}
    for module, pair in sorted(sides.items()):
        if set(pair) != {"A", "B"}:
            raise BadArtifact(f"{where}: {module} has lora_{next(iter(pair))} alone; every A needs its B.")
        rank = pair["A"].shape[0]
        out[module] = (pair["A"], pair["B"] * _scale(about, module, rank, alphas))
    return Adapter(out)


def _scale(about: Mapping[str, object], module: str, rank: int, alphas: Mapping[str, float]) -> float:
    if module in alphas:
        return alphas[module] / rank
    patterns = about.get("alpha_pattern") or {}
    assert isinstance(patterns, Mapping)
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), about.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(str(alpha)) / (rank**0.5 if about.get("use_rslora") else rank)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write `adapter` both ways: as a peft folder, and as the file that diffusers' `load_lora_weights` and
    `unet.load_lora_adapter(..., prefix="unet")` read. alpha = r in both, the scale is inside B."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: int(a.shape[0]) for name, (a, _) in adapter.factors.items()}
    most = max(ranks.values(), default=1)
    about = {
        "peft_type": "LORA", "r": most, "lora_alpha": most, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted(ranks), "use_rslora": False, "use_dora": False, "task_type": None,
        "base_model_name_or_path": None, "rank_pattern": {k: r for k, r in ranks.items() if r != most},
        "alpha_pattern": {k: r for k, r in ranks.items() if r != most},
    }  # fmt: skip
    peft, stock = {}, {}
    for name, (a, b) in adapter.factors.items():
        for side, x in (("A", a), ("B", b)):
            peft[f"base_model.model.{name}.lora_{side}.weight"] = x.detach().cpu().contiguous()
            stock[f"unet.{name}.lora_{side}.weight"] = x.detach().cpu().contiguous()
    save_file(peft, folder / PEFT, {"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    inside = {
        k: v for k, v in about.items() if k in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    }
    save_file(
        stock, folder / DIFFUSERS,
        {"format": "pt", METADATA: json.dumps({f"unet.{k}": v for k, v in inside.items()}, sort_keys=True)},
    )  # fmt: skip


def truncated(adapter: Adapter, rank: int) -> Adapter:
    """The nearest adapter of at most `rank`, in canonical form: B = U sqrt(S), A = sqrt(S) V^T of each update's SVD,
    the sign such that the largest number of A's row is positive."""
    out = {}
    for name, (a, b) in adapter.factors.items():
        (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, s, v = torch.linalg.svd(rb @ ra.T)
        k = min(rank, len(s))
        new_a, new_b = (qa @ v.mT[:, :k]).T, qb @ u[:, :k]
        sign = new_a.gather(1, new_a.abs().argmax(1, keepdim=True)).sign()
        root = s[:k].sqrt()
        out[name] = (root[:, None] * sign * new_a, new_b * (root[:, None] * sign).T)
    return Adapter(out)
