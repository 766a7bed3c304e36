"""What a long fit says while it works: bars in a terminal, lines elsewhere (a log, a pipe, CI), at least one in ten
seconds. Everything goes to stderr; what a verb answers is on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from tqdm import tqdm as library

from registry.home import home

EVERY_S = 10.0
"""longest silence of a fit"""
_spoke = time.monotonic()
"""when the last line was said"""


def say(text: str) -> None:
    """A line on stderr, at once."""
    global _spoke
    _spoke = time.monotonic()
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class tqdm(library):  # type: ignore[misc]
    """tqdm's bar in a terminal; elsewhere a line when ten seconds were silent, and one at the end of a long phase."""

    def __init__(self, *args: Any, disable: bool | None = None, **more: Any) -> None:
        self.lines = disable is None and not sys.stderr.isatty()
        self.began = time.monotonic()
        more |= {"mininterval": EVERY_S / 10, "file": io.StringIO(), "leave": False} if self.lines else {}
        super().__init__(*args, disable=bool(disable) if self.lines else disable, **more)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or say a line if it is time."""
        if not self.lines:
            return bool(super().display(msg, pos))
        if time.monotonic() - _spoke >= EVERY_S and self.n:
            say(f"  {self.told()}")
        return True

    def clear(self, nolock: bool = False) -> None:
        """Wipe the bar; lines stay."""
        if not self.lines:
            super().clear(nolock)

    def close(self) -> None:
        """The end of the phase."""
        long = self.lines and not self.disable and time.monotonic() - self.began >= EVERY_S
        super().close()
        if long:
            say(f"  {self.told()}, done")

    def told(self) -> str:
        """What it is at, of how much, since when, and how long it may still take."""
        took = time.monotonic() - self.began
        of = f" of {self.total:,} ({self.n / self.total:.0%})" if self.total else ""
        more = took / self.n * (self.total - self.n) if self.total and self.n else 0.0
        left = f", about {span(more)} left" if more > 0 else ""
        return f"{(self.desc or 'working').rstrip(': ')}: {self.n:,}{of}, {span(took)}{left}"


@contextlib.contextmanager
def told(what: str, key: str) -> Iterator[None]:
    """Say every ten silent seconds that `what` is still at work; remember under `key` how long it took."""
    start, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(1.0):
            if time.monotonic() - _spoke >= EVERY_S and not sys.stderr.isatty():
                say(f"  {what}: {span(time.monotonic() - start)} so far")

    thread = threading.Thread(target=beat, daemon=True, name="progress")
    thread.start()
    try:
        yield
        _remember(key, time.monotonic() - start)
    finally:
        over.set()
        thread.join()


def span(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def steps(config: Any, path: str = "") -> dict[str, int]:
    """Every number of steps in a config, by where it stands."""
    out: dict[str, int] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            out |= steps(value, f"{path}{field.name}.")
        elif field.name in ("steps", "iterations", "rounds") and isinstance(value, int) and value > 0:
            out[f"{path}{field.name}"] = value
    return out


def last_time(key: str) -> float | None:
    """Seconds that it took the last time in this home, if it was done here."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads((home() / "durations.json").read_text()).get(key)
        return float(found) if found is not None else None
    return None


def _remember(key: str, seconds: float) -> None:
    with contextlib.suppress(OSError):
        file = home() / "durations.json"
        try:
            known = json.loads(file.read_text())
        except (OSError, ValueError):
            known = {}
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({**known, key: round(seconds, 1)}, indent=1, sort_keys=True))
        os.replace(part, file)
