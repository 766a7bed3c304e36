"""Every variable of the environment that patchbay reads: name -> what it says. A test holds it to the source, and the
table in docs/settings.md to it."""

from __future__ import annotations

VARIABLES = {
    "PATCHBAY_HOME": "folder of this deployment: artifacts, ledger, events, MLflow's store; default `.patchbay` in the "
    "working folder",
    "PATCHBAY_CACHE": "folder of converted bases, which are the same for everybody; default `~/.cache/patchbay`",
    "PATCHBAY_DB": "PostgreSQL for ledger and events of all replicas: `postgresql://user:password@host/name`; default: "
    "files in the home",
    "PATCHBAY_STORE": "S3-compatible store that artifacts are put in and pulled from: `s3://bucket/prefix`; default: "
    "none",
    "PATCHBAY_WHO": "who decides, as the ledger writes it down; default: the user that the process runs as",
    "PATCHBAY_BASE": "reference of the base (`--base`): of several roles in the system's order, with commas; default: "
    "what the artifact names",
    "PATCHBAY_DEVICE": "where a service runs (`--device`): `cpu`, `cuda`, `cuda:1`, "
    "or `cuda:0,cuda:1` for a language model too large for one; default `cpu`",
    "PATCHBAY_DTYPE": "`fp32`, `bf16` or `fp16` for a base's weights (`--dtype`); default fp32 on a CPU, bf16 on a GPU",
    "PATCHBAY_PROVIDER": "`cpu` or `cuda`: serve with ONNX Runtime instead of torch (`--provider`)",
    "PATCHBAY_SLOTS": "rows of one batch (`--slots`); default 32",
    "PATCHBAY_CONTEXT": "tokens of a row, prompt and answer (`--context`); default 4096",
    "PATCHBAY_KV_GIB": "GiB that keys and values of all rows may take; default: what is free, less a reserve",
    "PATCHBAY_ARM_GIB": "GiB that arms which are models of their own may take; default: what is free",
    "PATCHBAY_TOKENS": "file of callers' tokens (`--tokens`); without it this machine alone may call",
    "PATCHBAY_ORIGINS": "pages elsewhere whose scripts may call, with commas: `https://a.example`",
    "PATCHBAY_IMAGE": "image that Bentos are built on, by digest: `python@sha256:<64 digits>`; default "
    "`python:3.11-slim`",
    "PATCHBAY_LOG": "`json`: a service writes its logs as JSON lines, one for every request too; default `text`",
    "PATCHBAY_WORKERS": "workers of a service (`--workers`), each with a copy of the base, on GPUs one each; default 1",
    "PATCHBAY_REPLICAS": "replicas on Ray Serve (`bentos/ray_serve.py`); default 1",
    "PATCHBAY_PINNED": "sealed folder of the one artifact to serve, without ledger and store; a Bento carries its own",
    "PATCHBAY_PICTURES": "folder of labelled pictures for which heads and neurons are shown",
    "PATCHBAY_GENERATOR_URL": "OpenAI-compatible endpoint that proposes texts to a search",
    "PATCHBAY_GENERATOR_MODEL": "model to ask for there",
    "PATCHBAY_GENERATOR_KEY": "key to send there",
    "PATCHBAY_SIGNERS": "files of public keys, or `sigstore:<identity>@https://<issuer>`, with commas: what none of "
    "them signed is not promoted, split, served or packed (extra `signing`)",
    "PATCHBAY_STREAM": "`fp32` (default) or `bf16`: how clip_sae keeps recorded activations",
    "PATCHBAY_STREAM_FOLDER": "folder for recorded activations, a file per site; default: memory",
    "PATCHBAY_SYSTEM": "system of a service's process; `patchbay serve SYSTEM` sets it",
    "PATCHBAY_URL": "address that a service says it answers at; `patchbay serve` sets it",
    "PATCHBAY_BENCH": "digest that `patchbay bench` measures; it sets it",
    "PATCHBAY_BENCH_SECONDS": "seconds that `patchbay bench --all` takes for a comparison, about; default 30",
    "PATCHBAY_BENCH_SERVERS": "names of the servers that it compares over HTTP, with commas; default: all",
    "PATCHBAY_JUDGE_KEY": "key to send to the judge model of `patchbay report --judge URL`",
    "PATCHBAY_JUDGE_TOKEN": "token of the service whose pairs it judges",
    "PATCHBAY_LM_EVAL": "questions that the bench asks of lm-eval's task; default 360, which is all of them",
    "PATCHBAY_BENCH_LLM": "reference of the language model that `make bench` measures",
}
OTHERS = {
    "MLFLOW_TRACKING_URI": "your own MLflow; default: sqlite in `$PATCHBAY_HOME`",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "address of an OpenTelemetry collector: requests are traced there (extra `tracing`)",
    "HF_HOME": "cache of the hub's models and data sets",
    "OMP_NUM_THREADS": "threads of torch; a service takes all cores but one",
}
"""variables of libraries that matter here"""


def table() -> str:
    """Both as a Markdown table."""
    rows = [f"| `{name}` | {text} |" for name, text in {**VARIABLES, **OTHERS}.items()]
    return "\n".join(["| variable | what it says |", "|---|---|", *rows]) + "\n"
