"""Real clips with labels, in their true layouts: UCF101, HMDB51, Kinetics-style folders, UCF101-P and DAVIS.

| reader | what lies in the folder |
|---|---|
| `ucf101` | `UCF-101/<Class>/v_*.avi` and `ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt` |
| `hmdb51` | `<class>/*.avi` and `testTrainMulti_7030_splits/<class>_test_split<N>.txt` (1 train, 2 test, 0 unused) |
| `kinetics` | `<split>/<class>/*.mp4`, or a `<split>.csv` of `path label` or `path,label` beside the clips |
| `ucf101_p` | `<corruption>/<severity>/<Class>/v_*.avi`, or `<corruption>/<Class>/...`; test clips of UCF101, damaged |
| `davis` | `JPEGImages/<res>/<clip>/*.jpg`, `Annotations/<res>/<clip>/*.png`, `ImageSets/<year>/<split>.txt` |

Clips are decoded by PyAV (`pip install patchbay[video]`; its wheels carry FFmpeg with GPL parts) in a process of its
own with limits on memory, time, pixels and frames, so that a broken file costs one error and nothing else. Frames are
counted by decoding: headers lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patches.families.video.decode import Limits, fit, read
from registry.errors import BadArtifact, NotFound
from training.data.images import Batch, Dataset

SUFFIXES = {".avi", ".mp4", ".webm", ".mkv", ".mov", ".m4v", ".gif"}


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip a model sees."""

    frames: int = 16
    stride: int = 4
    size: int = 224


def ucf101(folder: str | Path, split: str = "test", fold: int = 1, sampling: Sampling = Sampling()) -> Dataset:
    """UCF101 by one of its three official folds. Raises NotFound naming what is missing."""
    root = Path(folder)
    lists, videos = _need(root / "ucfTrainTestlist"), _need(root / "UCF-101")
    classes = [line.split()[1] for line in _lines(lists / "classInd.txt")]
    named = "train" if split == "train" else "test"
    files, labels = [], []
    for line in _lines(lists / f"{named}list{fold:02d}.txt"):
        name = line.split()[0]
        files.append(videos / name)
        labels.append(classes.index(name.split("/")[0]))
    return _dataset("ucf101", split, classes, files, labels, sampling, {"fold": fold})


def hmdb51(folder: str | Path, split: str = "test", fold: int = 1, sampling: Sampling = Sampling()) -> Dataset:
    """HMDB51 by one of its three official folds, whose files number train 1, test 2 and neither 0."""
    root = Path(folder)
    lists = _need(root / "testTrainMulti_7030_splits")
    wanted = "1" if split == "train" else "2"
    found = sorted(lists.glob(f"*_test_split{fold}.txt"))
    if not found:
        raise NotFound(f"{lists} has no *_test_split{fold}.txt. Put the official split files there.")
    classes = [f.name.removesuffix(f"_test_split{fold}.txt") for f in found]
    files, labels = [], []
    for i, file in enumerate(found):
        for line in _lines(file):
            name, number = line.split()
            if number == wanted:
                files.append(root / classes[i] / name)
                labels.append(i)
    return _dataset("hmdb51", split, classes, files, labels, sampling, {"fold": fold})


def kinetics(folder: str | Path, split: str = "val", sampling: Sampling = Sampling()) -> Dataset:
    """Kinetics as folders of classes, or as a list of paths with labels."""
    root = Path(folder)
    table = root / f"{split}.csv"
    if table.is_file():
        rows = [re.split(r"[,\s]+", line) for line in _lines(table)]
        rows = [r for r in rows if r[-1].isdigit()] or [r for r in rows if r[0] != "label"]
        names = sorted({r[-1] for r in rows}, key=lambda x: (not x.isdigit(), int(x) if x.isdigit() else 0, x))
        files = [root / r[0] for r in rows]
        return _dataset("kinetics", split, names, files, [names.index(r[-1]) for r in rows], sampling, {})
    where = _need(root / split) if (root / split).is_dir() else _need(root)
    classes = sorted(d.name for d in where.iterdir() if d.is_dir())
    pairs = [(f, i) for i, c in enumerate(classes) for f in sorted((where / c).iterdir()) if f.suffix in SUFFIXES]
    return _dataset("kinetics", split, classes, [f for f, _ in pairs], [i for _, i in pairs], sampling, {})


def ucf101_p(
    folder: str | Path, corruption: str, severity: int = 3, sampling: Sampling = Sampling()
) -> Dataset:  # fmt: skip
    """One corruption of UCF101-P. Raises NotFound with the corruptions that lie there."""
    root = _need(Path(folder))
    there = sorted(d.name for d in root.iterdir() if d.is_dir())
    if corruption not in there:
        raise NotFound(f"{root} has no corruption {corruption!r:.40}. There are: {', '.join(there)[:300]}.")
    where = root / corruption
    where = where / str(severity) if (where / str(severity)).is_dir() else where
    classes = sorted(d.name for d in where.iterdir() if d.is_dir())
    pairs = [(f, i) for i, c in enumerate(classes) for f in sorted((where / c).iterdir()) if f.suffix in SUFFIXES]
    about = {"corruption": corruption, "severity": severity}
    return _dataset("ucf101_p", "test", classes, [f for f, _ in pairs], [i for _, i in pairs], sampling, about)


@dataclass(frozen=True)
class Tracked:
    """One clip of DAVIS: its frames, and the objects in each."""

    name: str
    video: Tensor
    """(T, 3, H, W) uint8"""
    mask: Tensor
    """(T, H, W) uint8 labels, 0 the background"""


def davis(
    folder: str | Path, split: str = "val", year: str = "2017", resolution: str = "480p", size: int = 0
) -> list[Callable[[], Tracked]]:  # fmt: skip
    """The clips of DAVIS, each read when called. size: shorter edge resized to; 0 as it is."""
    root = Path(folder)
    names = _lines(_need(root / "ImageSets" / year / f"{split}.txt"))
    return [lambda name=name: _davis(root, name, resolution, size) for name in names]  # type: ignore[misc]


def _davis(root: Path, name: str, resolution: str, size: int) -> Tracked:
    frames = sorted(_need(root / "JPEGImages" / resolution / name).glob("*.jpg"))
    masks = sorted(_need(root / "Annotations" / resolution / name).glob("*.png"))
    if len(frames) != len(masks) or not frames:
        raise BadArtifact(f"{name} of DAVIS has {len(frames)} frames and {len(masks)} masks. Take the full archive.")
    video = torch.stack([torch.from_numpy(np.asarray(Image.open(f).convert("RGB")).copy()) for f in frames])
    video = video.permute(0, 3, 1, 2).contiguous()
    # palette pictures: the index is the object's number
    mask = torch.stack([torch.from_numpy(np.asarray(Image.open(f).convert("P")).copy()) for f in masks])
    if size:
        h, w = video.shape[-2:]
        new = (size, round(w * size / h)) if h <= w else (round(h * size / w), size)
        video = torch.nn.functional.interpolate(video.float(), size=new, mode="bilinear", antialias=True).round().byte()
        mask = torch.nn.functional.interpolate(mask[:, None].float(), size=new, mode="nearest")[:, 0].byte()
    return Tracked(name, video, mask)


READERS: Mapping[str, Callable[..., Dataset]] = {
    "ucf101": ucf101, "hmdb51": hmdb51, "kinetics": kinetics, "ucf101_p": ucf101_p,
}  # fmt: skip


def _dataset(
    name: str, split: str, classes: Sequence[str], files: Sequence[Path], labels: Sequence[int], sampling: Sampling,
    about: Mapping[str, Any],
) -> Dataset:  # fmt: skip
    if not files:
        raise NotFound(f"{name}/{split} lists no clips. Check that the folder is the whole data set.")
    gone = [f for f in files if not f.is_file()]
    if gone:
        raise NotFound(f"{name}/{split}: {len(gone)} of {len(files)} clips are missing, the first {gone[0]}.")
    label = torch.tensor(labels, dtype=torch.int64)

    def read_rows(rows: Tensor) -> Batch:
        clips = [
            fit(
                read(files[i].read_bytes(), Limits(max_bytes=1 << 30)),
                sampling.frames,
                sampling.size,
                sampling.stride,
            )
            for i in rows.tolist()
        ]
        return Batch(torch.stack(clips), label[rows], {"file": [files[i].name for i in rows.tolist()]})

    whole = {**about, **vars(sampling), "files": len(files)}
    return Dataset(name, split, tuple(classes), len(files), whole, read_rows)


def _need(path: Path) -> Path:
    if not path.exists():
        raise NotFound(f"There is no {path}. The module's table says which layout is read.")
    return path


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in _need(file).read_text().splitlines() if line.strip()]


__all__ = ["READERS", "Sampling", "Tracked", "davis", "hmdb51", "kinetics", "ucf101", "ucf101_p"]
