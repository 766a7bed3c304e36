"""lm-eval's likelihood tasks over HTTP: what a patch does to a language model off its target.

The task is one of lm-eval's own kind, multiple choice by log-likelihood, and its items are made here, so that nothing
is fetched: the last word of a sentence among those of three other sentences. `measured` sends every item to one arm of
a running service through lm-eval's own client (`local-completions`).
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

from registry.measure import Measure
from training.data.text import PARAGRAPHS
from training.tasks.intervals import mean, share

NAME = "patchbay_last_word"
METRIC = f"off_target/lm_eval/{NAME}"


def items(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions {"context", "choices", "answer"}: sentences of prose and reference without their last word, which is
    one of four last words."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics  # every CPython carries them
    whole = " ".join([*PARAGRAPHS, *(re.sub(r"\s+", " ", topics[k]) for k in sorted(topics))])
    found = re.findall(r"(?<=[.!?] )([A-Z][a-z]+(?: [a-z',;-]+){6,24}) ([a-z]{3,12})\.", whole)
    sentences = sorted(set(found))
    rng = random.Random(seed)
    rng.shuffle(sentences)
    out = []
    for context, word in sentences[:count]:
        others = [w for w in rng.sample(sorted({w for _, w in sentences}), 4) if w != word][:3]
        choices = [word, *others]
        rng.shuffle(choices)
        out.append({"context": context, "choices": choices, "answer": choices.index(word)})
    return out


def task(folder: Path, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's config of the task, its items as a file in `folder`."""
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in questions))
    return {
        "task": NAME, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
        "doc_to_choice": "choices", "doc_to_target": "answer", "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def measured(
    url: str, arm: str, tokenizer: Path, folder: Path, count: int
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Accuracy and log-likelihood of the true word by one arm of the service at `url`, and lm-eval's own results.

    tokenizer: a folder with the base's tokenizer; folder: for the items and lm-eval's caches.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    import lm_eval

    about = {
        "base_url": f"{url}/v1/completions", "model": arm, "tokenizer": str(tokenizer), "batch_size": 16,
        "tokenizer_backend": "huggingface", "tokenized_requests": True, "num_concurrent": 1, "max_retries": 1,
        "max_length": 512,
    }  # fmt: skip
    got = lm_eval.simple_evaluate(
        "local-completions", model_args=about, tasks=[task(folder, items(count))], log_samples=True, bootstrap_iters=0,
        verbosity="ERROR",
    )  # fmt: skip
    samples = got["samples"][NAME]
    true = [float(s["filtered_resps"][s["doc"]["answer"]][0]) for s in samples]
    return {
        f"{METRIC}/accuracy": share([s["acc"] > 0 for s in samples]),
        f"{METRIC}/loglikelihood": mean(true, "higher"),
    }, got["results"][NAME]
