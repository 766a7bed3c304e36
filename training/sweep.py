"""Fit a recipe once for each combination of settings, one after another or as tasks of a Ray cluster.

    python -m training.sweep attention_sink/tiny seed=0,1,2 damp=0.5,1 [--on ray]

Every fit is what `patchbay fit` of the same words makes, bit for bit, wherever it ran: a sealed folder in the home,
which a cluster's machines have to share. What the fits chose on val lies in each folder's evidence; test data is not
looked at here (`patchbay eval DIGEST` of the one that is chosen).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry import manifest
from registry.errors import ConfigError, PatchbayError
from registry.home import home

MOST = 1000
"""fits of one sweep"""
EXTRA = "pip install 'patchbay[ray]'"
On = Literal["here", "ray"]


@dataclass(frozen=True)
class Trial:
    """One fit of a sweep."""

    words: tuple[str, ...]
    """Settings as key=value"""
    digest: str = ""
    """Digest that was sealed; empty if it failed"""
    folder: str = ""
    seconds: float = 0.0
    error: str = ""
    """why it failed; the others go on"""


def grid(words: Iterable[str]) -> list[tuple[str, ...]]:
    """Every combination of key=value,value,... words, the last key fastest. Raises ConfigError for more than MOST.

    Commas inside brackets belong to one value.
    """
    axes = []
    for word in words:
        key, equals, values = word.partition("=")
        if not equals:
            raise ConfigError(f"{word[:80]!r} is no setting. Write key=value, or key=value,value to try both.")
        axes.append([f"{key}={value}" for value in _values(values)])
    n = 1
    for axis in axes:
        n *= len(axis)
    if n > MOST:
        raise ConfigError(f"That is {n:,} fits; a sweep has at most {MOST:,}. Name fewer values.")
    return list(itertools.product(*axes))


def _values(text: str) -> list[str]:
    out, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            out.append("")
        else:
            out[-1] += letter
    return out


def sweep(recipe: str, words: Sequence[str], on: On = "here") -> Iterator[Trial]:
    """Fit every combination; trials as they end. Raises what is wrong with recipe or words before anything is fitted.

    on: "ray" runs them as tasks of the cluster that RAY_ADDRESS names, or of one made of this machine; a fit takes one
    GPU each if its `device` is one.
    """
    from training import run

    trials = grid(words)
    for one in trials:
        run.recipe(recipe, one)
    if on == "here":
        yield from (trial(recipe, one) for one in trials)
        return
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(f"Ray is not installed: {EXTRA}") from None
    given = {k: v for k, v in os.environ.items() if k.startswith(("PATCHBAY_", "HF_", "OMP_"))}
    ray.init(
        ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {**given, "PATCHBAY_HOME": str(home()), "PYTHONPATH": os.pathsep.join(sys.path)}},
    )  # fmt: skip
    try:
        task = ray.remote(max_retries=1)(trial)
        gpus = [float(any(w.startswith("device=cuda") for w in one)) for one in trials]
        left = [task.options(num_cpus=1, num_gpus=g).remote(recipe, one) for g, one in zip(gpus, trials, strict=True)]
        while left:
            (done, *_), left = ray.wait(left)
            yield ray.get(done)
    finally:
        ray.shutdown()


def trial(recipe: str, words: Sequence[str]) -> Trial:
    """Fit one combination; a failure of the fit is the trial's own."""
    from training import run

    start, words = time.monotonic(), tuple(words)
    try:
        folder = run.fit(recipe, words)
    except PatchbayError as e:
        return Trial(words, seconds=time.monotonic() - start, error=str(e))
    return Trial(words, manifest.read(folder).digest, str(folder), time.monotonic() - start)


def main(given: Sequence[str] | None = None) -> int:
    """Print a line of JSON per trial; exit status 1 if one failed, 2 for words that make no sense."""
    reader = argparse.ArgumentParser(prog="python -m training.sweep", description="Fit a recipe with several settings.")
    reader.add_argument("recipe", metavar="SYSTEM/RECIPE")
    reader.add_argument("words", nargs="*", metavar="key=value,value")
    reader.add_argument("--on", choices=("here", "ray"), default="here")
    args = reader.parse_args(given)
    failed = 0
    try:
        for one in sweep(args.recipe, args.words, args.on):
            failed += bool(one.error)
            row: dict[str, Any] = asdict(one)
            sys.stdout.write(f"{json.dumps(row)}\n")
            sys.stdout.flush()
    except PatchbayError as e:
        sys.stderr.write(f"{e}\n")
        return 2 if e.status == 400 else 1
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
