"""Measure attention_sink: whether the model repeats a word once more, and the patch's cost in perplexity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patches.families.base import Base
from patches.families.llm.worker import Decoder, Row
from patches.subject import Subject
from registry.measure import Measure
from training.attention_sink.config import Config, Context
from training.attention_sink.find import residual_norms
from training.data import text
from training.progress import tqdm
from training.tasks.intervals import mean, perplexity, share


def prompt(base: Base, word: int, context: Context) -> list[int]:
    """Return the token ids before the copies.

    chat: a user's request and the start of the answer; prefix: a sentence; bos: BOS alone.
    """
    tokenizer = base.processor
    if context == "chat":
        said = f"Repeat the word{tokenizer.decode([word])} over and over, separated by spaces."
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(chat, add_special_tokens=False)["input_ids"])
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    more = tokenizer("Here is the word repeated many times:", add_special_tokens=False)["input_ids"]
    return [*bos, *more] if context == "prefix" else bos


@dataclass(frozen=True)
class Repeats:
    """Whether the model predicts the word once more after N copies of it, for each word."""

    right: dict[int, list[bool]]
    """N -> whether the top prediction is the word, one per word"""
    log_p: dict[int, list[float]]
    """N -> log-probability of the word, one per word"""


def repeats(
    model: Subject,
    words: list[int],
    context: Context,
    copies: tuple[int, ...],
    arm: str | None,
    quiet: bool = False,
) -> Repeats:
    """Judge the next token after every run length of each word, in one forward over the longest run.

    The model is causal, so every shorter run is a prefix of it.
    """
    out = Repeats({n: [] for n in copies}, {n: [] for n in copies})
    for w in tqdm(words, f"{context} x {max(copies)}", disable=None if not quiet else True, leave=False):
        lead = prompt(model.base, w, context)
        ids = torch.tensor([[*lead, *[w] * max(copies)]], device=model.base.device)
        at = torch.tensor([len(lead) + n - 1 for n in copies], device=model.base.device)
        logits = model(rows=[arm], input_ids=ids, use_cache=False, logits_to_keep=at).logits[0].float()
        scores = logits.log_softmax(-1)[:, w].tolist()
        best = logits.argmax(-1).tolist()
        for n, score, token in zip(copies, scores, best, strict=True):
            out.right[n].append(token == w)
            out.log_p[n].append(score)
    return out


def losses(model: Subject, docs: list[Tensor], arm: str | None) -> list[tuple[float, int]]:
    """Return, per document, the summed negative log-likelihood in nats and the number of scored tokens."""
    out = []
    for ids in docs:
        x = ids[None].to(model.base.device)
        logits = model(rows=[arm], input_ids=x, use_cache=False).logits[0, :-1].float()
        out.append((float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum")), len(ids) - 1))
    return out


def continuations(model: Subject, words: list[int], config: Config, arm: str | None) -> list[bool]:
    """Return, per word, whether a greedy continuation of many copies repeats it throughout; the worker decodes."""
    rows = []
    for w in words:
        lead = prompt(model.base, w, config.contexts[0])
        rows.append(
            Row([*lead, *[w] * config.continue_after], arm=arm, max_tokens=config.continue_tokens, ignore_eos=True)
        )
    Decoder(model.base, model.applied, slots=8).run(rows)
    return [row.out == [w] * config.continue_tokens for row, w in zip(rows, words, strict=True)]


@torch.inference_mode()
def norm_ratio(model: Subject, words: list[int], copies: int, arm: str | None) -> float:
    """Return the norm of the last of many repeats over that of ordinary text, at the worst layer, median over words."""
    base = model.base
    bos = [base.processor.bos_token_id] if base.processor.bos_token_id is not None else []
    with model.applied.rows([arm]):
        ordinary = torch.cat(
            [n[:, 1:] for n in residual_norms(base, text.documents("prose", base.processor, 6, 80))], 1
        ).mean(1)
        loud = [
            float((n[:, -1] / ordinary).max())
            for n in residual_norms(base, [torch.tensor([*bos, *[w] * copies]) for w in words])
        ]
    return float(torch.tensor(loud).median())


def evaluate(model: Subject, config: Config, arm: str | None) -> dict[str, Measure]:
    """Measure an arm on test words and documents: repeating, perplexity, and the residual norm of repeats.

    Metric names are the same for base and patched.
    """
    words = measured_words(model.base, config)
    out: dict[str, Measure] = {}
    for context in config.contexts:
        got = repeats(model, words, context, config.copies, arm)
        for n in config.copies:
            out[f"quality/repeat_{context}_{n}"] = share(got.right[n])
        out[f"quality/logp_{context}_{max(config.copies)}"] = mean(got.log_p[max(config.copies)])
    if config.continue_tokens:
        out[f"quality/continue_{config.continue_after}"] = share(continuations(model, words, config, arm))
    for source in text.SOURCES:
        docs = held_documents(model.base, config, source)
        out[f"quality/perplexity_{source}"] = perplexity(losses(model, docs, arm))
    some = words[:6]
    ratio = norm_ratio(model, some, min(500, max(config.copies)), arm)
    out["target/repeat_norm_ratio"] = Measure(round(ratio, 6), n=len(some), better="lower")
    return out


def fit_words(base: Base, config: Config) -> list[int]:
    """Draw the words on which candidates are judged."""
    return text.words(base.processor, config.fit_words, config.seed + 1)


def measured_words(base: Base, config: Config) -> list[int]:
    """Draw the test words, none of which candidates were judged on."""
    return text.words(base.processor, config.test_words, config.seed + 2, set(fit_words(base, config)))


def held_documents(base: Base, config: Config, source: str) -> list[Tensor]:
    """Return test documents: those of a source after the ones that fitting reads."""
    return text.documents(source, base.processor, config.documents, config.document_tokens, skip=4)
