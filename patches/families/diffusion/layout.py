"""Parts of a pipeline folder in diffusers' layout: weights as safetensors, configs as JSON, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from patches.families.diffusion.schedule import Schedule
from registry.errors import NotFound


def component(cls: Any, folder: Path) -> Any:
    """A component of class `cls` in float32. Raises NotFound if the folder, its config or safetensors are missing."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise NotFound(
            f"{folder} needs config.json and weights as safetensors. Only safetensors are read; convert a .bin first."
        )
    try:
        with quiet():
            return cls.from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        raise NotFound(f"{folder} cannot be read as {cls.__name__}: {str(e)[:300]}") from None


def schedule(folder: Path, part: str = "scheduler") -> Schedule:
    """The noise schedule of a pipeline folder; `part` names it where a pipeline has several."""
    file = folder / part / "scheduler_config.json"
    try:
        return Schedule(json.loads(file.read_text()))
    except (OSError, ValueError):
        raise NotFound(f"{folder} has no readable {part}/scheduler_config.json.") from None


def config(model: Any) -> dict[str, Any]:
    """A diffusers model's config without what names the machine or the library's version."""
    return {k: v for k, v in json.loads(model.to_json_string()).items() if not k.startswith("_") or k == "_class_name"}


@contextmanager
def quiet() -> Iterator[None]:
    """Within this block transformers draws no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
