"""The page of numbers: docs/NUMBERS.md, made by `patchbay bench --all` (`make bench`), one process per part.

Times are ratios of rounds in which every variant ran in turn, with the 95 % interval of the median; what is absolute is
CPU time of one thread. A part that failed says so in its place. Parts are kept as JSON and made anew by name:
`python -m tests.bench.numbers clip_sae http`; `page` alone writes the page of what there is.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.home import home
from registry.systems import SYSTEMS

ROOT = Path(__file__).parents[2]
ARMS = (1, 4, 16, 64)
BUDGET_S = float(os.environ.get("PATCHBAY_BENCH_SECONDS", "30"))
"""seconds for each comparison, about; at least ROUNDS are run whatever they take"""
ROUNDS = 6
"""from which the smallest and the largest hold the median in 95 % of cases"""
BLOCKS, CALLS = 10, 5
"""over HTTP: blocks of calls of each server, all in turn"""
PARTS = [*SYSTEMS, "http", "start"]


def place() -> Path:
    """Where parts are kept."""
    folder = home() / "numbers"
    folder.mkdir(exist_ok=True)
    return folder


def _rounds(run: Callable[[], object], variants: int) -> int:
    start = time.process_time()
    run()
    return max(ROUNDS, min(40, int(BUDGET_S / max(1e-3, variants * (time.process_time() - start)))))


def measured(name: str) -> dict[str, Any]:
    """One system: its arm beside its base, and many arms beside as many base rows in one batch."""
    import torch

    from patches.engine.patch import ONLY, Patch
    from tests.bench.cases import JOBS, SLOTS, case, copy_of, foldable, folded
    from tests.bench.interleave import interleave, ratio

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    one = case(name)
    arm = one.subject.arms.get(ONLY)
    out: dict[str, Any] = {"note": one.note, "row": JOBS[one.subject.family.name], "base": one.subject.base.label}
    bare = name in ("toto", "videomae") and arm is None  # the artifact is the model itself
    with contextlib.ExitStack() as stack:
        stack.callback(one.subject.close)
        variants: dict[str, Callable[[], object]] = {"base": lambda: one.run(None), "base again": lambda: one.run(None)}
        if not bare:
            variants["patched"] = lambda: one.run(ONLY)
        if (fit := foldable(arm)) is not None:
            whole = folded(name, fit)
            stack.callback(whole.subject.close)
            variants["folded"] = lambda: whole.run(None)
        engine = None
        if one.subject.family.engine:
            try:
                engine = case(name, provider="cpu")
                stack.callback(engine.subject.close)
                variants["onnx, base"] = lambda: engine.run(None)
                if isinstance(arm, Patch):
                    variants["onnx, patched"] = lambda: engine.run(ONLY)
            except Exception as e:
                out["onnx"] = f"{type(e).__name__}: {e}"[:200]
        for run in variants.values():
            run()
        rounds = _rounds(lambda: [run() for run in variants.values()], 1)
        times = interleave(variants, rounds, warmup=1, clock=time.process_time)
        out["ratios"] = {k: asdict(ratio(t, times["base"])) for k, t in times.items() if k != "base"}
        out["base_ms"] = 1e3 * sorted(times["base"])[len(times["base"]) // 2]
        if one.many and isinstance(arm, Patch):
            before = _memory()
            for i in range(SLOTS):
                one.subject.add(f"a{i}", copy_of(arm))
            gc.collect()
            out["arms_mib"] = _memory() - before
            out["arms"] = {}
            for n in ARMS:
                arms = [f"a{i}" for i in range(n)]
                pair = {
                    "base": lambda n=n: one.run(*[None] * n),
                    "base again": lambda n=n: one.run(*[None] * n),
                    "arms": lambda arms=arms: one.run(*arms),
                }
                got = interleave(pair, _rounds(pair["arms"], 3), warmup=1, clock=time.process_time)
                out["arms"][str(n)] = {k: asdict(ratio(got["base"], got[k])) for k in ("arms", "base again")}
                print(f"{name}: {n} arms {out['arms'][str(n)]['arms']['median']:.3f}", flush=True)
    return out


def _memory() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def asked() -> dict[str, Any]:
    """What every server is asked: one picture, eight labels."""
    import numpy as np
    from PIL import Image

    from tests.bench.others import LABELS

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(file, "PNG")
    return {"images": [{"data": base64.b64encode(file.getvalue()).decode()}], "labels": list(LABELS)}


def http() -> dict[str, Any]:
    """One caller's wait for one picture, over the same work in process; all servers in one run, in turn."""
    import httpx
    import psutil

    from tests.bench.interleave import interleave, ratio
    from tests.bench.load import memory_mb, tree
    from tests.bench.others import PATH, Work

    body, said, pids = asked(), {}, {}
    work = Work()
    want = work(body)["label"]
    variants: dict[str, Callable[[], object]] = {"in process": lambda: work(json.loads(json.dumps(body)))}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=120))
        wanted = [w.strip() for w in os.environ.get("PATCHBAY_BENCH_SERVERS", "").split(",") if w.strip()]
        for name, start in servers().items():
            if wanted and name not in wanted:
                said[name] = "not asked for in this run (PATCHBAY_BENCH_SERVERS)"
                continue
            try:
                url, pids[name] = stack.enter_context(start())
                pyfunc = name.startswith("mlflow")
                record = {"image": body["images"][0]["data"], "labels": json.dumps(body["labels"])}
                sent = json.dumps({"dataframe_records": [record]} if pyfunc else body).encode()
                where = url + ("/invocations" if pyfunc else PATH)

                def ask(where: str = where, sent: bytes = sent) -> Any:
                    got = client.post(where, content=sent, headers={"content-type": "application/json"})
                    return got.raise_for_status().json()

                if want not in json.dumps(ask()):
                    raise ValueError(f"answers something else than {want}")
                variants[name] = ask
            except Exception as e:  # one server that cannot be had leaves the others to be measured
                said[name] = f"{type(e).__name__}: {str(e)[:160]}"
                print(f"http: {name}: {said[name]}", flush=True)
        variants["in process again"] = variants["in process"]
        used: dict[str, list[float]] = {name: [] for name in variants}

        def timed(name: str) -> Callable[[], object]:
            ask, processes = variants[name], tree(pids[name]) if name in pids else [psutil.Process()]

            def cpu() -> float:
                return 1e3 * sum(sum(p.cpu_times()[:2]) for p in processes)

            def run() -> None:
                start = cpu()
                ask()
                used[name].append(cpu() - start)

            return run

        variants |= {name: timed(name) for name in variants}
        times = interleave(variants, CALLS * BLOCKS, warmup=CALLS)
        memory = {name: memory_mb(pid) for name, pid in pids.items()}
    base = times["in process"]
    # a process's CPU time is told in hundredths of a second, so of several calls at once
    cpu = {name: [statistics.fmean(t[-i - CALLS : -i or None]) for i in range(0, CALLS * BLOCKS, CALLS)]
           for name, t in used.items()}  # fmt: skip
    return {
        "ratios": {k: asdict(ratio(t, base)) for k, t in times.items() if k != "in process"},
        "cpu": {k: asdict(ratio(t, cpu["in process"])) for k, t in cpu.items() if k != "in process"},
        "cpu_ms": {k: statistics.median(t) for k, t in cpu.items()}, "mib": memory, "missing": said,
        "in_process_ms": 1e3 * statistics.median(base), "calls": CALLS,
    }  # fmt: skip


def servers() -> dict[str, Callable[[], Any]]:
    """Name -> what starts it, as a context that gives its address and process; only what is installed."""
    env = {"OMP_NUM_THREADS": "1"}
    out: dict[str, Callable[[], Any]] = {
        "patchbay serve": lambda: _ours("serve", env),
        "patchbay's Bento under BentoML": lambda: _ours("bentoml", env),
        "patchbay's application under uvicorn": lambda: _ours("uvicorn", env),
        "bare Starlette": lambda: _started("uvicorn", "--factory", "tests.bench.others:floor", "--log-level", "warning",
                                           "--no-access-log", "--port"),
        "plain BentoML": lambda: _started("bentoml", "serve", "tests.bench.plain_bento:Plain", "--port"),
        "LitServe": lambda: _started("tests.bench.plain_lit"),
        "mlflow models serve": _mlflow,
        "Ray Serve": lambda: _started("tests.bench.others"),
    }  # fmt: skip
    return out


@contextlib.contextmanager
def _ours(kind: Any, env: dict[str, str]) -> Iterator[tuple[str, int]]:
    from tests.bench.server import running

    with running("clip_sae", kind=kind, PATCHBAY_BASE="lab:clip", **env) as server:
        yield server.url, server.pid


@contextlib.contextmanager
def _started(module: str, *words: str, port: int = 0, ready: str = "/readyz") -> Iterator[tuple[str, int]]:
    import socket

    import httpx

    from tests.bench.server import end

    if not port:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    log = (place() / f"{'-'.join((module, *words[:1])).replace('.', '-')}.log").open("wb")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0",
           "RAY_raylet_start_wait_time_s": "120"}  # fmt: skip

    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    process = subprocess.Popen([sys.executable, "-m", module, *words, str(port)], cwd=ROOT, env=env, stdout=log,
                               stderr=log)  # fmt: skip
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}{ready}", timeout=2).status_code == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"it ended with status {process.returncode}; {log.name} says why")
            if time.monotonic() > until:
                raise TimeoutError("not ready within 180 s")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        end(process)
        log.close()


@contextlib.contextmanager
def _mlflow() -> Iterator[tuple[str, int]]:
    """The base's version in MLflow, served by MLflow alone."""
    import tempfile

    from patches import artifact
    from registry import store
    from registry.store.mlflow_client import connected, find_base, versions
    from tests.bench.cases import case

    one = case("clip_sae")
    try:
        with tempfile.TemporaryDirectory() as part:
            artifact.save(
                next(iter(one.subject.arms.values())), "clip_sae", Path(part, "s"), base=one.subject.base.label
            )
            store.push(Path(part, "s"))
    finally:
        one.subject.close()
    with connected():
        newest = versions("tags.`system` = 'clip_sae'")[0]
        base = find_base(newest.name, newest.tags["base.digest"])
    uri = f"models:/{base.name}/{base.version}"
    os.environ["MLFLOW_TRACKING_URI"] = store.tracking_uri()
    with _started("mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port", ready="/ping") as got:
        yield got


def start() -> dict[str, Any]:
    """Seconds and CPU seconds from typing `patchbay serve` to ready and to the first answer, and memory; thrice."""
    from tests.bench.load import cpu_s, memory_mb
    from tests.bench.server import running

    out: dict[str, Any] = {}
    for name, base in {"clip_heads": "lab:clip", "attention_sink": "pypi:smollm2"}.items():
        rows = []
        for _ in range(3):
            with running(name, kind="typed", PATCHBAY_BASE=base, OMP_NUM_THREADS="2") as server:
                rows.append((server.ready_s, server.answer_s, cpu_s(server.pid), memory_mb(server.pid)))
                print(f"start: {base} {rows[-1]}", flush=True)
        best = min(rows)
        out[base] = {"ready_s": best[0], "answer_s": best[1], "cpu_s": best[2], "mib": best[3], "runs": len(rows),
                     "worst_s": max(rows)[0]}  # fmt: skip
    return out


# ---- all of it -------------------------------------------------------------------------------------------------------


def part(name: str) -> None:
    """Measure one part and keep it."""
    got = http() if name == "http" else start() if name == "start" else measured(name)
    got["about"] = about()
    (place() / f"{name}.json").write_text(json.dumps(got, indent=1))


def about() -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    import platform
    from importlib import metadata

    import psutil
    import torch

    def version(name: str) -> str | None:
        return metadata.version(name) if importlib.util.find_spec(name) else None

    wanted = ("torch", "transformers", "onnxruntime", "bentoml", "mlflow", "starlette", "uvicorn", "litserve", "ray")
    versions = {}
    for name in wanted:
        try:
            versions[name] = version(name)
        except metadata.PackageNotFoundError:
            versions[name] = metadata.version("onnxruntime-gpu")
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30), "python": platform.python_version(),
        "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1), "versions": versions, "commit": commit.stdout.strip() or "none",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []


def main(words: list[str]) -> int:
    """Measure the parts of these names (none: all), each in its own process, and write the page."""
    if words[:1] == ["--part"]:
        part(words[1])
        return 0
    failed = []
    for name in [w for w in words or PARTS if w != "page"]:
        if name not in PARTS:
            print(f"There is no part {name!r}; parts are {', '.join(PARTS)}, and page.", file=sys.stderr)
            return 2
        code = subprocess.run([sys.executable, "-m", "tests.bench.numbers", "--part", name], cwd=ROOT, check=False)
        if code.returncode:
            failed.append(name)
    from tests.bench.page import write

    print(write(place()))
    if failed:
        print(f"These failed, and the page has what it had of them: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
