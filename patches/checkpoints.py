"""Folders that others made: what keeps one from being read, said in one line with the way out.

`check_folder` looks at names, sizes and the first bytes of files before a library does; `reading` turns whatever a
library raises after that into one line; `check_weights` refuses what was read and is no model: parameters that no file
has, NaN. Nothing here knows a family.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry import manifest
from registry.errors import BadArtifact, NotFinite, NotFound, PatchbayError
from registry.home import cache

LFS = b"version https://git-lfs.github.com/spec/"
"""how a file begins that stands for one which Git LFS did not fetch"""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHERS = {".msgpack": "Flax's", ".h5": "Keras'", ".onnx": "ONNX'"}
PARTS = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
SHAPING = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
           "chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
           "merges.txt", "tekken.json", "preprocessor_config.json", "processor_config.json")  # fmt: skip
"""files beside weights, config and tokenizer.json that shape what a model of transformers' layout reads or says"""
VOLATILE = ("transformers_version", "_name_or_path", "name_or_path", "tokenizer_file", "torch_dtype", "dtype",
            "_from_model_config", "_commit_hash")  # fmt: skip
"""keys that name a library's version, a machine's path or how weights were stored, and change no output"""


# ---- before a library looks ---------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raises NotFound or BadArtifact for a folder of transformers' layout that cannot be read, naming what to do."""
    check_config(folder)
    about = json_object(folder / "config.json")
    if about.get("quantization_config"):
        how = about["quantization_config"]
        how = how.get("quant_method", "some method") if isinstance(how, dict) else how
        raise NotFound(
            f"{folder} is quantised ({str(how)[:40]}), and patches need weights they can be added to. Take the "
            "checkpoint it was made from, or a GGUF file (gguf:path), which is dequantised once."
        )
    check_tensors(folder, sorted(f for f in folder.iterdir() if f.is_file()))


def check_files(folder: Path) -> None:
    """Raises NotFound or BadArtifact for a folder, of whatever layout, with files that were not fetched, or in part."""
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}. Give local-dir:path/to/folder.")
    for file in (f for pattern in ("*", "*/*") for f in sorted(folder.glob(pattern)) if f.is_file()):
        if file.suffix in PARTS:
            raise BadArtifact(f"{file} is a download that did not finish. Start it again.")
        if file.suffix == ".safetensors":
            check_whole(file)
        else:
            check_fetched(file)


def check_config(folder: Path) -> None:
    """Raises NotFound for a folder that holds no model's config, naming what it holds and what to do."""
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}. Give local-dir:path/to/folder.")
    files = sorted(f for f in folder.iterdir() if f.is_file())
    for file in files:
        check_fetched(file)
    names = {f.name for f in files}
    if "adapter_config.json" in names and "config.json" not in names:
        of = json_object(folder / "adapter_config.json").get("base_model_name_or_path") or "another model"
        raise NotFound(
            f"{folder} holds an adapter of {str(of)[:80]!r}, not a model. It comes in as a patch: patchbay import "
            f"{folder}"
        )
    if "config.json" not in names:
        deeper = [f.parent for f in folder.glob("*/config.json")]
        hint = f"Did you mean local-dir:{deeper[0]}?" if deeper else "Give a folder that save_pretrained wrote."
        if any(f.suffix == ".gguf" for f in files):
            hint = f"Give gguf:{next(f for f in files if f.suffix == '.gguf')}."
        raise NotFound(f"{folder} has no config.json. {hint}")


def check_tensors(folder: Path, files: Iterable[Path]) -> None:
    """Raises NotFound if there are no safetensors among the files of a folder, or not all that its index names;
    BadArtifact for one that is cut off."""
    files = list(files)
    tensors = [f for f in files if f.suffix == ".safetensors"]
    if begun := [f for f in files if f.suffix in PARTS]:
        raise BadArtifact(f"{begun[0]} is a download that did not finish. Start it again.")
    if not tensors:
        if pickles := [f for f in files if f.suffix in PICKLES]:
            raise NotFound(
                f"{folder} has its weights as a pickle ({pickles[0].name}), which could run code. Only safetensors are "
                "read: take the revision that has them, or convert it where you trust it (load, then save_pretrained)."
            )
        other = next((OTHERS[f.suffix] for f in files if f.suffix in OTHERS), "no")
        raise NotFound(f"{folder} has {other} weights. Only safetensors are read; get its *.safetensors.")
    for index in (f for f in files if f.name.endswith(".safetensors.index.json")):
        held = json_object(index).get("weight_map", {})
        wanted = sorted(set(held.values())) if isinstance(held, dict) else []
        if missing := [w for w in wanted if not (folder / w).is_file()]:
            raise NotFound(
                f"{folder} lacks {len(missing)} of the {len(wanted)} files that {index.name} names ({missing[0]}). Get "
                "them all again."
            )
    for file in tensors:
        check_whole(file)


def check_fetched(file: Path) -> None:
    """Raises NotFound for a file that Git LFS stands for."""
    if file.stat().st_size < 1024:
        with file.open("rb") as f:
            if f.read(len(LFS)) == LFS:
                raise NotFound(
                    f"{file} is a Git LFS pointer: git cloned the name, not the file. Run: git lfs pull, in its folder."
                )


def check_whole(file: Path) -> None:
    """Raises BadArtifact for a safetensors file that is shorter or longer than its header says, or has none."""
    check_fetched(file)
    size = file.stat().st_size
    try:
        with file.open("rb") as f:
            n = struct.unpack("<Q", f.read(8))[0]
            head = json.loads(f.read(n)) if n < min(size, manifest.MAX_HEADER_BYTES) else None
        ends = [v["data_offsets"][1] for k, v in head.items() if k != "__metadata__"] if head is not None else None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        ends = None
    if ends is None:
        raise BadArtifact(f"{file} ({size} bytes) is no safetensors file, or only its beginning. Get it again.")
    if size != (want := 8 + n + max(ends, default=0)):
        raise BadArtifact(f"{file} is cut off: its header promises {want} bytes, it has {size}. Download it again.")


def check_tokenizer(folder: Path) -> None:
    """Raises NotFound for a folder without anything a tokenizer is read from."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise NotFound(
            f"{folder} has no tokenizer ({', '.join(TOKENIZERS[:3])} ...). Put the files of one beside its weights."
        )


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BadArtifact naming the file."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise BadArtifact(f"{file} is not JSON. Get it again.") from None
    if not isinstance(value, dict):
        raise BadArtifact(f"{file} is not a JSON object. Get it again.")
    return value


# ---- while it looks, and after ------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(
    what: str, way_out: str = "Get the folder again, or read it with the library that wrote it."
) -> Iterator[None]:
    """Whatever is raised while `what` is read is one line: NotFound, with the way out. Ours go through as they are."""
    try:
        yield
    except (PatchbayError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        said = " ".join(str(e).split())[:200].rstrip(".")
        raise NotFound(f"{what} cannot be read ({type(e).__name__}: {said}). {way_out}") from None


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """Raises NotFound for weights that a library made up because no file had them. info: transformers' loading info."""
    if missing := sorted(info.get("missing_keys") or ()):
        raise NotFound(
            f"{name}: no file has {len(missing)} of its weights ({missing[0]}{', ...' if len(missing) > 1 else ''}); "
            "they would be random numbers. Get all files of one revision, or a config that fits them."
        )


@torch.inference_mode()
def check_weights(name: str, model: nn.Module) -> None:
    """Raises NotFinite naming the first parameter with NaN or infinity."""
    for key, p in model.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p.sum(dtype=torch.float32)) and not bool(p.isfinite().all()):
            bad = int((~p.isfinite()).sum())
            raise NotFinite(
                f"{name}: {bad} of {p.numel()} numbers of {key[:80]!r} are NaN or infinite. The file is damaged or the "
                "dtype is too small for it; get it again, or load it with ?dtype=fp32."
            )


# ---- what a folder is ---------------------------------------------------------------------------------------------


def shaping(folder: Path) -> dict[str, str]:
    """name -> sha256 of each file beside the weights that shapes an output, JSON without what names machine or
    library. Raises BadArtifact for JSON that is none."""
    out = {}
    for file in (folder / name for name in SHAPING):
        if file.is_file():
            if file.suffix == ".json" and file.name != "vocab.json":
                out[file.name] = manifest.digest_of(_stable(json_object(file)))
            else:
                out[file.name] = remembered(file)
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        out[f"additional_chat_templates/{file.name}"] = remembered(file)
    return out


def _stable(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k not in VOLATILE}


class _Hashes:
    """sha256 of large files by path, size, time and inode, kept between runs. For bases alone: what was sealed is
    hashed each time."""

    known: dict[str, str] | None = None


def remembered(file: Path) -> str:
    """sha256 of a file, from memory if it has the size, time and place it had."""
    s = file.stat()
    key = f"{file.resolve()}|{s.st_size}|{s.st_mtime_ns}|{s.st_ctime_ns}|{s.st_ino}"
    if s.st_size < 1 << 20:
        return manifest.sha256(file)
    kept = cache() / "hashes.json"
    if _Hashes.known is None:
        try:
            known = json.loads(kept.read_bytes())
            _Hashes.known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            _Hashes.known = {}
    if (found := _Hashes.known.get(key)) is not None:
        return str(found)
    digest = manifest.sha256(file)
    if file.stat().st_mtime_ns != s.st_mtime_ns:  # it changed meanwhile
        return manifest.sha256(file)
    where = f"{file.resolve()}|"
    _Hashes.known = {k: v for k, v in _Hashes.known.items() if not k.startswith(where)} | {key: digest}
    with contextlib.suppress(OSError):
        part = kept.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(_Hashes.known))
        os.replace(part, kept)
    return digest
