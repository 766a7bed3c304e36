"""Where patchbay keeps things: `$PATCHBAY_HOME`, else `.patchbay` in the working directory.

    runs/       sealed folders made by fit, one per artifact, named system-digest16
    artifacts/  sealed folders pulled from the store, named by digest
    exports/    checkpoints with a patch folded in
    bentos/     Dockerfile, Kubernetes manifests and contents of each Bento; the Bento itself is in BentoML's store
    mlflow.db   MLflow's default back end, with mlartifacts/ beside it
    ledger.db   who is champion, who challenges, since when
    events.db   exposures and outcomes of experiments

Converted bases are large and the same for everyone, so they live in the user's cache:
`$PATCHBAY_CACHE`, else `~/.cache/patchbay`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

PART = ".part-"
"""how names of folders begin that somebody is still writing"""
STALE_S = 24 * 3600.0
"""seconds after which such a folder is left over, if it does not say whose it is"""


def home() -> Path:
    """The folder of this deployment, made if missing."""
    path = Path(os.environ.get("PATCHBAY_HOME") or ".patchbay").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def cache() -> Path:
    """The folder of converted bases, made if missing."""
    path = Path(os.environ.get("PATCHBAY_CACHE") or Path.home() / ".cache" / "patchbay").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def part_prefix() -> str:
    """How the name of a folder begins that this process is writing, so that others can tell when it is left over."""
    return f"{PART}{_machine()}-{os.getpid()}-"


def swept(folder: Path) -> Path:
    """The folder, made if missing, without half-written ones in it whose process is gone (on this machine) or that
    nobody touched for a day."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    for part in stale(folder):
        shutil.rmtree(part, ignore_errors=True)
    return folder


def stale(folder: Path) -> list[Path]:
    """Half-written folders in `folder` that nobody goes on with."""
    return [part for part in folder.glob(f"{PART}*") if part.is_dir() and not part.is_symlink() and _left_over(part)]


def _left_over(part: Path) -> bool:
    here = _machine()
    host, _, rest = part.name.removeprefix(PART).partition("-")
    number = rest.partition("-")[0]
    if host == here and number.isdigit():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's process, and alive
            return False
        return False
    try:
        return time.time() - part.stat().st_mtime > STALE_S
    except OSError:
        return False


def _machine() -> str:
    """This machine's name as it may stand in a folder's."""
    return os.uname().nodename[:40].replace("-", "_")
