"""Candidates out of what a language model says: numbered lines, bullets, a JSON list, or one line as it is."""

from __future__ import annotations

import json
import re

MAX_ANSWER = 64 << 10
"""characters of an answer that are looked at"""
_COUNTER = re.compile(r"^\s*(?:(?:\d{1,4}|[a-z])[.):\]]+(?=\s)|[-*•>]+(?=\s))\s*", re.IGNORECASE)
_SCORE = re.compile(r"^\s*[-+]?\d{1,3}(?:\.\d+)?\s*[:|]\s*")
_MARKUP = re.compile(r"<[^>]{0,200}>?|```\w*")
_SPECIAL = re.compile(r"<\|[^|]{0,40}\|>|</?s>")
_QUOTES = "\"'“”‘’`"


def candidate(line: str, words: int) -> str:
    """One line as a candidate: without counter, score, quotes and closing punctuation, cut to so many words.

    "" for a line that holds markup or no word of two letters.
    """
    text = _SPECIAL.sub(" ", line)
    if _MARKUP.search(text):
        return ""
    text = _COUNTER.sub("", text)
    text = _SCORE.sub("", text)
    text = re.sub(r"\s+", " ", text).strip().strip(_QUOTES).rstrip(".!;,:").strip(_QUOTES).strip()
    if not re.search(r"[^\W\d_]{2}", text) or "\ufffd" in text:
        return ""
    return " ".join(text.split(" ")[:words])


def candidates(answer: str, words: int) -> list[str]:
    """The candidates of a whole answer, in order, each once. Numbered or bulleted lines if there are any, else all
    lines; a JSON list of texts is read as one. What is none is left out, so nonsense gives nothing."""
    answer = answer[:MAX_ANSWER]
    found = _json(answer)
    if found is None:
        lines = _SPECIAL.sub("\n", answer).splitlines()
        if _MARKUP.match(answer.lstrip()):  # a page of HTML, not an answer
            lines = []
        numbered = [line for line in lines if _COUNTER.match(line)]
        found = numbered or [line for line in lines if not line.rstrip().endswith(":")]
    made = (candidate(line, words) for line in found)
    return list(dict.fromkeys(text for text in made if text))


def _json(answer: str) -> list[str] | None:
    start, end = answer.find("["), answer.rfind("]")
    if start < 0 or end < start:
        return None
    try:
        values = json.loads(answer[start : end + 1])
    except ValueError:
        return None
    texts = [v if isinstance(v, str) else next((x for x in v.values() if isinstance(x, str)), "")
             for v in values if isinstance(v, str | dict)]  # fmt: skip
    return [t for t in texts if t] or None
