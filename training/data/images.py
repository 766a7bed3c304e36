"""Labelled images as one value, `Dataset`, and readers of the real data sets (the lab's twins: training/lab/worlds.py).

A `Dataset` holds name, split, classes, size, everything that determined its images (hence a digest for MLflow), and
`read`.

    for batch in imagenet(folder, "val"):         # batch.image (B, 3, 224, 224) uint8, batch.label (B,)
        ...

| reader | expected content of the folder |
|---|---|
| `imagenet` | `<split>/<class>/*.jpg`, or `<class>/*.jpg` |
| `celeba` | `img_align_celeba/`, `list_attr_celeba.txt`, `list_eval_partition.txt` |
| `waterbirds` | `metadata.csv` and the images it names |
| `rta` | `label=X_text=Y.png`: RTA-100, PAINT |
| `disentangling` | `annotations.json` and the images it names |
| `scam` | Parquet files of SCAM, as the hub keeps them |
| `imagenet_seg` | `gtsegs_ijcv.mat`, or `images/` and `masks/` |

Images are rotated by their EXIF tag, composited on white, converted to RGB, resized (shorter edge, bicubic) and
centre-cropped, as CLIP's own preprocessing does. Broken, animated, huge or tiny files are refused by name. Nothing here
downloads. Test sets cannot be tuned on: the typographic readers have the split `test` only.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from patches.families.pictures import SIDE_BY_SIDE, eight_bits
from registry import manifest
from registry.errors import Invalid, NotFound, NotReady, TooLarge

BATCH = 64
SIZE = 224
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
SMALLEST, LARGEST = 8, 64_000_000
"""Limits on an image in pixels: of its shorter edge (at least), of its area (at most)"""
_DEEP = {"I;16", "I;16B", "I;16L", "I;16N"}
_MODES = _DEEP | {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Batch:
    """B labelled images."""

    image: Tensor
    """(B, 3, H, W) uint8; clips are (B, T, 3, H, W)"""
    label: Tensor
    """(B,) int64 index in the data set's classes"""
    extras: Mapping[str, Any]
    """Further ground truth of each image: name -> (B, ...) tensor or B strings"""

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Dataset:
    """Labelled images with random access, and a description that identifies them."""

    name: str
    """Name as reported with every number, `lab:typographic` or `waterbirds`; the prefix marks lab numbers"""
    split: str
    classes: tuple[str, ...]
    size: int
    """Number of images"""
    about: Mapping[str, Any]
    """All parameters that determined the images, as plain values; part of the digest"""
    reader: Callable[[Tensor], Batch] = field(repr=False, compare=False)
    """Function from row indices (M,) to a Batch; called by `read`, which checks the indices"""

    def __len__(self) -> int:
        return self.size

    def read(self, rows: Sequence[int] | Tensor) -> Batch:
        """Read the images with these indices, in this order.

        Raises NotFound for an empty list or an index out of range.
        """
        rows = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows), dtype=torch.int64)
        if len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= self.size:
            raise NotFound(f"{self.name}/{self.split} has pictures 0 to {self.size - 1}; ask for at least one of them.")
        return self.reader(rows)

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield all images in order, in batches of `size`; the last one may be smaller."""
        for i in range(0, self.size, size):
            yield self.read(range(i, min(i + size, self.size)))

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    @property
    def digest(self) -> str:
        """Digest of the description (64 hex digits), equal on every machine for the same data set."""
        about = {"name": self.name, "split": self.split, "classes": list(self.classes), "size": self.size}
        return manifest.digest_of({**about, "about": dict(self.about)})


# ---- readers -----------------------------------------------------------------------------------------------------


def imagenet(
    folder: str | Path, split: str = "val", size: int = SIZE, names: Mapping[str, str] | None = None
) -> Dataset:
    """Read ImageNet or any set with one folder per class. names: folder -> class name, for folders called n01440764.

    Raises NotFound if there is no class folder or no image.
    """
    root = _folder(folder)
    root = root / split if (root / split).is_dir() else root
    classes = sorted(d.name for d in root.iterdir() if d.is_dir())
    if not classes:
        raise NotFound(f"{root} has no folders; put each class's pictures in a folder of its own.")
    files = [(f, i) for i, c in enumerate(classes) for f in _pictures(root / c)]
    labels = torch.tensor([i for _, i in files], dtype=torch.int64)
    shown = tuple((names or {}).get(c, c.replace("_", " ")) for c in classes)
    return _files("imagenet", split, shown, root, [f for f, _ in files], labels, {}, size)


def celeba(
    folder: str | Path,
    split: str = "test",
    size: int = SIZE,
    target: str = "Blond_Hair",
    spurious: str = "Male",
) -> Dataset:
    """Read CelebA as a binary task.

    Extras: `attributes` (B, 40) bool, `place` (B,) the spurious attribute, `group` (B,) 2 * label + place. Raises
    NotFound for a missing file or attribute, Invalid for a row of another length than the first.
    """
    root = _folder(folder)
    rows = [line.split() for line in _text(root / "list_attr_celeba.txt").splitlines()]
    if len(rows) < 3:
        raise Invalid(f"{root / 'list_attr_celeba.txt'} has no row after its count and its names.")
    names, rows = rows[1], rows[2:]
    if odd := next((r for r in rows if len(r) != len(names) + 1), None):
        raise Invalid(f"list_attr_celeba.txt: the row of {odd[:1]} has {len(odd) - 1} values, not {len(names)}.")
    if bad := [a for a in (target, spurious) if a not in names]:
        raise NotFound(f"CelebA here has no attribute {bad[0]!r:.40}. It has: {', '.join(names)}.")
    part = dict(line.split() for line in _text(root / "list_eval_partition.txt").splitlines() if line.strip())
    wanted = str(_number(split))
    rows = [r for r in rows if part.get(r[0]) == wanted]
    has = torch.tensor([[v == "1" for v in r[1:]] for r in rows], dtype=torch.bool).view(len(rows), len(names))
    label, place = (has[:, names.index(a)].long() for a in (target, spurious))
    extras = {"attributes": has, "place": place, "group": 2 * label + place}
    files = [root / "img_align_celeba" / r[0] for r in rows]
    said = target.replace("_", " ").lower()
    about = {"target": target, "spurious": spurious}
    return _files("celeba", split, (f"not {said}", said), root, files, label, extras, size, about)


def waterbirds(folder: str | Path, split: str = "test", size: int = SIZE) -> Dataset:
    """Read Waterbirds in its authors' layout. Extras: `place` (B,) 0 land, 1 water; `group` (B,) 2 * label + place.

    Raises Invalid for a metadata.csv without the needed columns.
    """
    root = _folder(folder)
    wanted = str(_number(split))
    try:
        rows = [r for r in csv.DictReader(io.StringIO(_text(root / "metadata.csv"))) if r["split"] == wanted]
        label, place = (torch.tensor([int(r[k]) for r in rows], dtype=torch.int64) for k in ("y", "place"))
        files = [root / r["img_filename"] for r in rows]
    except (KeyError, ValueError, TypeError) as e:
        raise Invalid(f"{root / 'metadata.csv'} needs img_filename, y, split and place in every row ({e}).") from None
    extras = {"place": place, "group": 2 * label + place}
    return _files("waterbirds", split, ("landbird", "waterbird"), root, files, label, extras, size)


def rta(folder: str | Path, split: str = "test", size: int = SIZE) -> Dataset:
    """Read a typographic set from its file names `label=X_text=Y`: object and written word.

    Extras: `word`, `word_label` (B,).

    Raises Invalid for any other file name.
    """
    root = _folder(folder)
    files = _pictures(root)
    found = [re.fullmatch(r"label=(.+?)_text=(.+)", f.stem) for f in files]
    if odd := next((f for f, m in zip(files, found, strict=True) if m is None), None):
        raise Invalid(f"{odd} is not called label=X_text=Y; a typographic set is read from its file names.")
    return _typographic("rta", split, root, files, [m.groups() for m in found if m], size)


def disentangling(folder: str | Path, split: str = "test", size: int = SIZE) -> Dataset:
    """Read the 180 photographs of Materzynska et al., Disentangling.

    Extras: `word`, `word_label` (B,), -1 without a word.
    """
    root = _folder(folder)
    file = next((root / n for n in ("annotations.json", "annotation.json") if (root / n).is_file()), None)
    if file is None:
        raise NotFound(f"{root} has no annotations.json, so what its pictures show is unknown.")
    try:
        about = {k: (v["true object"], v["typographic attack label"]) for k, v in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise Invalid(f"{file} does not say 'true object' and 'typographic attack label' per picture ({e}).") from None
    return _typographic("disentangling", split, root, [root / k for k in about], list(about.values()), size)


def scam(folder: str | Path, split: str = "test", size: int = SIZE, variant: str = "SCAM") -> Dataset:
    """Read SCAM's Parquet files, found anywhere under `folder`. variant: SCAM, NoSCAM (no word) or SynthSCAM.

    Extras: `word`, `word_label` (B,), `id` (its number pairs the three variants). The benchmark is two-way: label
    against word_label. NoSCAM images keep the word of their attacked twin, so that the same question can be asked.
    """
    import pyarrow.parquet as pq

    _test_only("scam", split)
    variants = ("SCAM", "NoSCAM", "SynthSCAM")
    if variant not in variants:
        raise NotFound(f"SCAM has no variant {variant!r:.40}. Variants: {', '.join(variants)}.")
    root = _folder(folder)
    files = sorted(root.rglob("*.parquet"))
    if not files:
        raise NotFound(f"{root} holds no .parquet file. Put SCAM's data folder there.")
    rows: list[tuple[int, int, int, str, str, str]] = []  # file, row group, row, id, object, word
    for i, file in enumerate(files):
        parquet = pq.ParquetFile(file)
        if missing := {"image", "id", "object_label", "attack_word"} - set(parquet.schema_arrow.names):
            raise Invalid(f"{file} has no column {', '.join(sorted(missing))}, so it is not SCAM's.")
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=["id", "object_label", "attack_word"]).to_pylist()
            for j, r in enumerate(table):
                if str(r["id"]).startswith(f"{variant}_"):
                    rows.append(
                        (i, group, j, str(r["id"]), str(r["object_label"]).strip(), str(r["attack_word"]).strip())
                    )

    @lru_cache(maxsize=2)
    def pictures(file: int, group: int) -> list[bytes]:
        table = pq.ParquetFile(files[file]).read_row_group(group, columns=["image"])
        return [r["image"]["bytes"] for r in table.to_pylist()]

    classes, label, word = _labelled([r[4:] for r in rows])

    def read(which: Tensor) -> Batch:
        mine = [rows[i] for i in which.tolist()]
        images = [_uint8(picture(pictures(f, g)[j], ident), size) for f, g, j, ident, _, _ in mine]
        extras = {"word": tuple(r[5] for r in mine), "word_label": word[which], "id": tuple(r[3] for r in mine)}
        return Batch(torch.stack(images), label[which], extras)

    about = {"size": size, "variant": variant, "files": [[f.name, f.stat().st_size] for f in files]}
    return Dataset("scam", split, classes, _some(len(rows), root), about, read)


def imagenet_seg(folder: str | Path, split: str = "test", size: int = SIZE) -> Dataset:
    """Read ImageNet-Segmentation: the published `gtsegs_ijcv.mat`, or `images/` and `masks/` with the same names.

    Extras: `mask` (B, size, size) bool, the foreground. The set has no classes, so every label is 0. The published file
    is HDF5, which the optional package h5py reads. Raises NotFound for an image without its mask.
    """
    _test_only("imagenet_seg", split)
    root = _folder(folder)
    published = root / "gtsegs_ijcv.mat"
    if published.is_file():
        return _gtsegs(published, split, size)
    files = _pictures(root / "images") if (root / "images").is_dir() else []
    if not files:
        raise NotFound(f"{root} has neither gtsegs_ijcv.mat nor a folder images. Put one of them there.")
    masks = [root / "masks" / f"{f.relative_to(root / 'images').with_suffix('')}.png" for f in files]
    if missing := next((m for m in masks if not m.is_file()), None):
        raise NotFound(f"There is no {missing}, the mask of a picture.")
    plain = _files("imagenet_seg", split, ("thing",), root, files, torch.zeros(len(files), dtype=torch.int64), {}, size)

    def read(rows: Tensor) -> Batch:
        batch = plain.reader(rows)
        seen = [_cut_mask(picture(masks[i]).convert("L"), size) for i in rows.tolist()]
        return Batch(batch.image, batch.label, {**batch.extras, "mask": torch.stack(seen)})

    about = {**plain.about, "masks": hashlib.sha256(b"".join(m.read_bytes() for m in masks)).hexdigest()}
    return Dataset("imagenet_seg", split, ("thing",), len(files), about, read)


def _gtsegs(file: Path, split: str, size: int) -> Dataset:
    """Read the published MATLAB 7.3 (HDF5) file. value/img and value/gt are rows of references: to images (3, w, h),
    and to cells that refer to masks (w, h)."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise NotReady(
            f"{file.name} is HDF5: install h5py, or unpack it into images/ and masks/ beside each other."
        ) from None

    def open_file() -> Any:
        try:
            return h5py.File(file, "r")
        except OSError as e:
            raise Invalid(f"{file.name} is no HDF5 file ({e}); get it again.") from None

    with open_file() as f:
        if "value/img" not in f or "value/gt" not in f:
            raise Invalid(f"{file.name} has no value/img and value/gt, so it is not ImageNet-Segmentation.")
        count = int(f["value/img"].shape[0])

    def read(rows: Tensor) -> Batch:
        images, seen = [], []
        with open_file() as f:
            for i in rows.tolist():
                pixels = np.asarray(f[f["value/img"][i, 0]]).transpose(2, 1, 0)
                cell = f[f["value/gt"][i, 0]]
                mask = np.asarray(f[cell[0, 0]] if cell.dtype == h5py.ref_dtype else cell).transpose(1, 0)
                images.append(_uint8(Image.fromarray(pixels.astype(np.uint8)).convert("RGB"), size))
                seen.append(_cut_mask(Image.fromarray((mask > 0).astype(np.uint8) * 255), size))
        return Batch(torch.stack(images), torch.zeros(len(images), dtype=torch.int64), {"mask": torch.stack(seen)})

    about = {"size": size, "bytes": file.stat().st_size}
    return Dataset("imagenet_seg", split, ("thing",), _some(count, file.parent), about, read)


READERS: dict[str, Callable[..., Dataset]] = {
    "imagenet": imagenet,
    "celeba": celeba,
    "waterbirds": waterbirds,
    "rta": rta,
    "disentangling": disentangling,
    "scam": scam,
    "imagenet_seg": imagenet_seg,
}


# ---- pictures ----------------------------------------------------------------------------------------------------


def picture(source: Path | bytes, name: str = "") -> Image.Image:
    """Decode an upright RGB image.

    Raises Invalid or TooLarge, naming the file, if it is broken, animated, huge or tiny.
    """
    name = name or str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > LARGEST:
                raise TooLarge(f"{name} has {width} x {height} pixels; at most {LARGEST // 10**6} million are read.")
            if min(width, height) < SMALLEST:
                raise Invalid(f"{name} is {width} x {height} pixels; the shorter edge must have {SMALLEST}.")
            if (frames := getattr(image, "n_frames", 1)) > 1 and image.format not in SIDE_BY_SIDE:
                raise Invalid(f"{name} is animated ({frames} frames); save the frame you mean.")
            if image.mode not in _MODES:
                raise Invalid(f"{name} stores its pixels as {image.mode}; save it with 8 bits a channel.")
            image.load()
            whole = eight_bits(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise NotFound(f"There is no {name}, which the data set names.") from None
    except Image.DecompressionBombError as e:
        raise TooLarge(f"{name}: {e}") from None
    except UnidentifiedImageError:
        raise Invalid(f"{name} is no picture of a known format, or its head is damaged.") from None
    except (OSError, SyntaxError, ValueError) as e:  # the exceptions that Pillow's decoders raise for broken files
        raise Invalid(f"{name} cannot be read to its end ({e}); get the file again.") from None
    if whole.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in whole.info:
        clear = whole.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return whole.convert("RGB")


def _uint8(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter edge to `size` and crop the centre: (3, size, size) uint8."""
    width, height = image.size
    scale = size / min(width, height)
    image = image.resize((max(size, int(width * scale)), max(size, int(height * scale))), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    crop = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def _cut_mask(mask: Image.Image, size: int) -> Tensor:
    """Resize and crop a mask as `_uint8` does the image: (size, size) bool, true where it is white."""
    return _uint8(mask.convert("RGB"), size)[0] > 127


# ---- their parts -------------------------------------------------------------------------------------------------


def _typographic(
    name: str, split: str, root: Path, files: Sequence[Path], pairs: Sequence[tuple[str, ...]], size: int
) -> Dataset:
    """Build the test-only data set of a typographic benchmark from its (object, word) pairs."""
    _test_only(name, split)
    classes, label, word = _labelled([tuple(x.replace("_", " ").strip() for x in p) for p in pairs])
    said = tuple(classes[i] if i >= 0 else "" for i in word.tolist())
    return _files(name, split, classes, root, files, label, {"word": said, "word_label": word}, size)


def _labelled(pairs: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Turn (object, word) pairs into classes (all objects and words) and their indices label and word; -1 for ""."""
    classes = sorted({x for pair in pairs for x in pair if x})
    at = {c: i for i, c in enumerate(classes)} | {"": -1}
    label, word = (torch.tensor([at[p[k]] for p in pairs], dtype=torch.int64) for k in (0, 1))
    return tuple(classes), label, word


def _files(
    name: str,
    split: str,
    classes: tuple[str, ...],
    root: Path,
    files: Sequence[Path],
    label: Tensor,
    extras: Mapping[str, Any],
    size: int,
    about: Mapping[str, Any] | None = None,
) -> Dataset:
    """Build the data set of image files in `root`.

    Raises Invalid for a file outside of it, NotFound for a missing one.
    """
    _some(len(files), root)
    inside = root.resolve()
    listing = hashlib.sha256()
    for f, y in zip(files, label.tolist(), strict=True):
        if not f.resolve().is_relative_to(inside):
            raise Invalid(f"{f} leads out of {root}; a data set's pictures lie inside its folder.")
        if not f.is_file():
            raise NotFound(f"There is no {f}, which the data set names.")
        listing.update(f"{f.relative_to(root).as_posix()} {f.stat().st_size} {y}\n".encode())

    def read(rows: Tensor) -> Batch:
        index = rows.tolist()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda i: _uint8(picture(files[i]), size), index))
        mine = {k: v[rows] if isinstance(v, Tensor) else tuple(v[i] for i in index) for k, v in extras.items()}
        return Batch(torch.stack(images), label[rows], {**mine, "file": tuple(str(files[i]) for i in index)})

    return Dataset(
        name, split, classes, len(files), {"size": size, "files": listing.hexdigest(), **(about or {})}, read
    )


def _folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise NotFound(f"There is no folder {path}. Give the one that holds the data set.")
    return path


def _text(file: Path) -> str:
    if not file.is_file():
        raise NotFound(f"There is no {file}. It is part of the data set and says what the pictures are.")
    return file.read_text()


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _some(count: int, root: Path) -> int:
    if not count:
        raise NotFound(f"{root} has no picture for this split.")
    return count


def _number(split: str) -> int:
    """Return the number by which CelebA and Waterbirds call a split: 0 train, 1 val, 2 test."""
    order = ("train", "val", "test")
    if split not in order:
        raise Invalid(f"split={split!r:.40} must be one of {', '.join(order)}.")
    return order.index(split)


def _test_only(name: str, split: str) -> None:
    if split != "test":
        raise Invalid(f"{name} has only the split test, so that nothing is chosen on it. Fit and choose elsewhere.")
