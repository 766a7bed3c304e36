"""Real clips with labels, in their true layouts: UCF101, HMDB51, Kinetics-style folders, UCF101-P and DAVIS.

| reader | what lies in the folder |
|---|---|
| `ucf101` | `UCF-101/<Class>/v_*.avi` and `ucfTrainTestlist/{classInd,trainlist0N,testlist0N}.txt` |
| `hmdb51` | `<class>/*.avi` and `testTrainMulti_7030_splits/<class>_test_split<N>.txt` (1 train, 2 test, 0 unused) |
| `kinetics` | `<split>/<class>/*.mp4`, or a `<split>.csv` of `path label` or `path,label` beside the clips |
| `ucf101_p` | `<corruption>/<severity>/<Class>/v_*.avi`, or `<corruption>/<Class>/...`; test clips of UCF101, damaged |
| `davis` | `JPEGImages/<res>/<clip>/*.jpg`, `Annotations/<res>/<clip>/*.png`, `ImageSets/<year>/<split>.txt` |

A recipe names one as `data=hmdb51:/folder` (a folder alone is UCF101's); `source` and `held` read it.

Clips are decoded by PyAV (`pip install patchbay[video]`; its wheels carry FFmpeg with GPL parts) in a process of its
own with limits on memory, time, pixels and frames, so that a broken file costs one error and nothing else. Frames are
counted by decoding: headers lie.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patches.families.video.decode import Decoded, Limits, fit, read
from registry.errors import BadArtifact, ConfigError, NotFound
from training.data.images import Batch, Dataset

SUFFIXES = {".avi", ".mp4", ".webm", ".mkv", ".mov", ".m4v", ".gif"}
FILES = Limits(max_bytes=1 << 30, wait=600.0)
"""the user's own files: a fit of hours does not end because a busy machine let one decoder wait"""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip a model sees."""

    frames: int = 16
    stride: int = 4
    size: int = 224


def ucf101(folder: str | Path, split: str = "test", fold: int = 1, sampling: Sampling = Sampling()) -> Listed:
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


def hmdb51(folder: str | Path, split: str = "test", fold: int = 1, sampling: Sampling = Sampling()) -> Listed:
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


def kinetics(folder: str | Path, split: str = "val", sampling: Sampling = Sampling()) -> Listed:
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
) -> Listed:  # fmt: skip
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


READERS: Mapping[str, Callable[..., Listed]] = {"ucf101": ucf101, "hmdb51": hmdb51, "kinetics": kinetics}
"""those a recipe's `data` may name"""


def source(data: str, split: str, sampling: Sampling = Sampling()) -> Listed:
    """The data set that `data` names (`READER:FOLDER`, or a folder of UCF101), by its first official fold.

    split: train, val or test. `val`, which the official lists lack, is the last tenth of each class of train, and
    `train` the rest: lists are in the order of the films that clips were cut from, so most films are in one of the two.
    Raises ConfigError for another reader, NotFound for what is missing.
    """
    name, colon, folder = data.partition(":")
    if not colon:
        name, folder = "ucf101", data
    if name not in READERS:
        raise ConfigError(f"data={data[:60]!r}: there is no reader {name!r:.30}. Readers: {', '.join(READERS)}.")
    if split == "test":
        whole = "val" if name == "kinetics" else "test"  # Kinetics' own test split was published without labels
        return READERS[name](folder, whole, sampling=sampling)
    every = READERS[name](folder, "train", sampling=sampling)
    label, kept = every.label, []
    for c in range(len(every.classes)):
        rows = (label == c).nonzero()[:, 0]
        cut = len(rows) - max(1, len(rows) // 10) if len(rows) > 1 else len(rows)
        kept.append(rows[:cut] if split == "train" else rows[cut:])
    return every.only(torch.cat(kept).sort().values, split)


def held(data: str, split: str, limit: int, sampling: Sampling = Sampling()) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Up to `limit` clips of a split, drawn at random but always alike: (n, T, 3, R, R) uint8, (n,) labels, classes.

    All are held in memory, and decoded on all processors.
    """
    found = source(data, split, sampling)
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:limit]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        batches = list(threads.map(lambda r: found.read([int(r)]), rows))
    return torch.cat([b.image for b in batches]), torch.cat([b.label for b in batches]), found.classes


@dataclass(frozen=True)
class Listed(Dataset):
    """A data set whose labels are known before any clip is decoded."""

    label: Tensor
    """(n,) int64"""

    def only(self, rows: Tensor, split: str) -> Listed:
        """Clips of these numbers alone, as another split."""
        about = {**self.about, "rows": [int(r) for r in rows]}
        return Listed(self.name, split, self.classes, len(rows), about, lambda r: self.reader(rows[r]),
                      self.label[rows])  # fmt: skip


def _dataset(
    name: str, split: str, classes: Sequence[str], files: Sequence[Path], labels: Sequence[int], sampling: Sampling,
    about: Mapping[str, Any],
) -> Listed:  # fmt: skip
    if not files:
        raise NotFound(f"{name}/{split} lists no clips. Check that the folder is the whole data set.")
    gone = [f for f in files if not f.is_file()]
    if gone:
        raise NotFound(f"{name}/{split}: {len(gone)} of {len(files)} clips are missing, the first {gone[0]}.")
    label = torch.tensor(labels, dtype=torch.int64)

    def read_rows(rows: Tensor) -> Batch:
        clips = [_fitted(read(files[i].read_bytes(), FILES), sampling) for i in rows.tolist()]
        return Batch(torch.stack(clips), label[rows], {"file": [files[i].name for i in rows.tolist()]})

    whole = {**about, **vars(sampling), "files": len(files)}
    return Listed(name, split, tuple(classes), len(files), whole, read_rows, label)


def _fitted(clip: Decoded, how: Sampling) -> Tensor:
    """(T, 3, R, R). A clip too short for the stride is seen whole; one with fewer frames than T waits at its last."""
    if (short := how.frames - len(clip.frames)) > 0:
        last = clip.frames[-1:].expand(short, -1, -1, -1)
        clip = Decoded(torch.cat([clip.frames, last]), torch.arange(how.frames, dtype=torch.float64), clip.size)
    return fit(clip, how.frames, how.size, how.stride if len(clip.frames) > (how.frames - 1) * how.stride else 0)


def _need(path: Path) -> Path:
    if not path.exists():
        raise NotFound(f"There is no {path}. The module's table says which layout is read.")
    return path


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in _need(file).read_text().splitlines() if line.strip()]


__all__ = ["READERS", "Listed", "Sampling", "Tracked", "davis", "held", "hmdb51", "kinetics", "source", "ucf101",
           "ucf101_p"]  # fmt: skip
