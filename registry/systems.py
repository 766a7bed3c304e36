"""THE table: one row per system, the only registration there is.

Rows hold strings, not imports, so listing them costs no torch. README's table is made from it and checked.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from registry.errors import NotFound


@dataclass(frozen=True)
class System:
    """One system: a paper's method under its one name, `training/<name>.py`."""

    name: str
    title: str
    paper: str
    """arXiv number, or where it was published"""
    families: tuple[str, ...]
    """patches/bases/<family>.py"""
    patch: str | None
    """module:Class of the mechanism; None for systems that edit nothing (a search) or are models themselves"""
    services: tuple[str, ...]
    """bentos/<shape>.py"""
    measured: str = ""
    """the claim as a number on a model anybody can have, for README's table; docs/LOG.md has n and interval"""

    @property
    def job(self) -> str:
        return f"training.{self.name}"

    @property
    def planned(self) -> bool:
        """The row is here, the job is not written yet."""
        return not (Path(__file__).parent.parent / "training" / self.name).is_dir()

    def load_job(self) -> ModuleType:
        """The training module. Raises NotFound while it is planned."""
        if self.planned:
            raise NotFound(f"{self.name} is planned: its job {self.job} is not written yet. See `patchbay systems`.")
        return importlib.import_module(self.job)

    def load_patch(self) -> type[Any]:
        """The mechanism's class. Raises NotFound for systems without one."""
        if self.patch is None:
            raise NotFound(f"{self.name} makes no patch: {self.title}.")
        module, _, name = self.patch.partition(":")
        try:
            return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
        except ModuleNotFoundError as e:
            if e.name != module:
                raise
            raise NotFound(f"{self.name} is planned: its mechanism {self.patch} is not written yet.") from None


_ROWS = (
    System("clip_sae", "Steer and suppress sparse-autoencoder features of CLIP's vision transformer",
           "2504.08729", ("clip",), "patches.mechanisms.features:FeatureEdit", ("classify", "explain.features"),
           "lab:clip under a wrong written word (2,000 unseen pictures and words): right on 5 %, patched 49 % "
           "(a blank strip alone: 53 %); says the word 57 %, patched 2.5 %; clean - .6 points (random features: right "
           "4 %, says it 56 %, clean - 4.6)"),
    System("clip_heads", "Name, measure and ablate the attention heads of CLIP",
           "2409.06579", ("clip",), "patches.mechanisms.heads:HeadEdit", ("explain.heads", "classify"),
           "lab:clip without its eight text heads (500 unseen pictures): says a wrong written word 51 %, patched 1 %; "
           "right 5 %, patched 48 %; clean - 3.6 points (eight random heads: says it 39 %, right 4 %, clean - 11)"),
    System("second_order", "Read and edit CLIP's neurons through their second-order effects",
           "2406.04341", ("clip",), "patches.mechanisms.neurons:NeuronEdit", ("explain.neurons", "classify"),
           "lab things found by what neurons add to their names: mIoU .64 (raw activations .41, heads' direct effects "
           ".69; 300 pictures), in 1 / 8,300 of the paper code's time; no defence: says a wrong word 51 %, patched 50"),
    System("attention_sink", "Find why a language model fails to repeat a word, and patch it",
           "2503.08908", ("llm",), "patches.mechanisms.sink:SinkEdit", ("generate",),
           "SmolLM2-135M predicts a word once more after 1,024 copies: base 28 %, patched 90 % (50 words, chat); "
           "perplexity x 1.000"),
    System("vlm_erasure", "Erase hallucinated objects from a vision-language model's image features",
           "2410.02762", ("vlm",), "patches.mechanisms.erase:EraseEdit", ("generate",)),
    System("mils", "Caption and prompt without training: a language model proposes, a scorer decides",
           "2501.18096", ("clip", "llm"), None, ("caption",)),
    System("toto", "Autoregressive video pre-training on visual tokens",
           "2501.05453", ("video",), None, ("embed",)),
    System("videomae", "VideoMAE pre-trained on synthetic video",
           "2410.24213", ("video",), None, ("embed",)),
    System("w2w", "Sample, edit and invert in the weight space of customised diffusion models",
           "2406.09413", ("diffusion",), "patches.mechanisms.subspace:SubspaceEdit", ("render",)),
    System("diffusion_cf", "Counterfactual images by moving a diffusion model's conditioning",
           "2504.08046", ("diffusion",), "patches.mechanisms.direction:DirectionEdit", ("render",)),
)  # fmt: skip

SYSTEMS: dict[str, System] = {row.name: row for row in _ROWS}


def system(name: str) -> System:
    """The row of `name`. Raises NotFound naming what there is."""
    try:
        return SYSTEMS[name]
    except KeyError:
        raise NotFound(f"There is no system {name[:60]!r}. Systems: {', '.join(SYSTEMS)}.") from None
