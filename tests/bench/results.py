"""From pytest-benchmark's file to the metrics that are kept with a version."""

from __future__ import annotations

import json
from pathlib import Path


def ratios(file: Path) -> dict[str, dict[str, float]]:
    """{"base": ..., "patched": ...} under the same names: ratios, the base's being 1, and what each side measured.

    A bench says in its extra_info: `ratios` and `throughput`, variant -> {"median"}; `sides`, metric -> {"base",
    "patched"}.
    """
    out: dict[str, dict[str, float]] = {"base": {}, "patched": {}}
    for bench in json.loads(Path(file).read_text())["benchmarks"]:
        extra = bench["extra_info"]
        name = bench["name"].removeprefix("bench_").replace("[", "_").rstrip("]")
        for kind, word in (("ratios", "latency"), ("throughput", "throughput")):
            for variant, measured in extra.get(kind, {}).items():
                if variant not in ("base", "base again"):
                    metric = f"bench/{word}_{name}_{variant.replace(' ', '_')}"
                    out["base"][metric], out["patched"][metric] = 1.0, measured["median"]
        for metric, values in extra.get("sides", {}).items():
            for side in out:
                out[side][f"bench/{metric}"] = values[side]
    return out
