"""From pytest-benchmark's file to the metrics that are kept with a version."""

from __future__ import annotations

import json
from pathlib import Path


def ratios(file: Path) -> dict[str, dict[str, float]]:
    """{"base": ..., "patched": ...}: every ratio measured, the base's being 1 by definition."""
    patched: dict[str, float] = {}
    for bench in json.loads(Path(file).read_text())["benchmarks"]:
        extra = bench["extra_info"]
        name = bench["name"].removeprefix("bench_").replace("[", "_").rstrip("]")
        for kind, word in (("ratios", "latency"), ("throughput", "throughput")):
            for variant, measured in extra.get(kind, {}).items():
                if variant not in ("base", "base again"):
                    patched[f"bench/{word}_{name}_{variant.replace(' ', '_')}"] = measured["median"]
        for metric, value in extra.get("metrics", {}).items():
            patched[f"bench/{metric}"] = value
    return {"base": dict.fromkeys(patched, 1.0), "patched": patched}
