"""A bank: the fixed lines a search begins with, and the words and phrases that mutation builds new lines from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from patches.families.search.config import MAX_LINES, MAX_WORDS
from registry.errors import Invalid, NotFound, TooLarge

FILE = "bank.txt"
"""lies in every artifact of kind `search`"""
MAX_LINE_CHARACTERS = 1000
JOINTS = frozenset(
    ["and", "on", "with", "in", "of", "under", "above", "beside", "behind", "over", "near", "at", "inside"]
)
"""words that begin a phrase: lines are cut before them and put together again there"""
BESIDE = frozenset(["and", "with", "beside", "near", "under", "above", "behind", "over"])
"""joints that bring one more thing"""
SHIPPED = Path(__file__).parent.parent.parent / "lab" / "mils" / FILE


@dataclass(frozen=True)
class Bank:
    """Lines that are all different, none empty. Made by `bank` or `read`."""

    lines: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """64 hex digits of the lines."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """Every phrase of every line once, in order of appearance."""
        return tuple(dict.fromkeys(p for line in self.lines for p in phrases(line)))

    @cached_property
    def by_joint(self) -> dict[str, tuple[str, ...]]:
        """The phrases that begin with a joint, by joint; those that begin a line, under ""."""
        out: dict[str, list[str]] = {}
        for p in self.phrases:
            out.setdefault(joint(p), []).append(p)
        return {k: tuple(v) for k, v in out.items()}

    @cached_property
    def shapes(self) -> frozenset[tuple[str, ...]]:
        """The sequences of joints that lines of the bank have: the grammar that mutation keeps to."""
        return frozenset(shape(line) for line in self.lines)


def phrases(line: str) -> list[str]:
    """A line cut before its joints: "a cat and a dog on sand" -> ["a cat", "and a dog", "on sand"]."""
    out: list[list[str]] = [[]]
    for word in line.split():
        if word in JOINTS and out[-1]:
            out.append([])
        out[-1].append(word)
    return [" ".join(p) for p in out if p]


def joint(phrase: str) -> str:
    """The joint a phrase begins with, or ""."""
    first = phrase.partition(" ")[0]
    return first if first in JOINTS else ""


def things(line: str) -> tuple[str, ...]:
    """A line's parts, each a line about one thing, without what is behind them: "a picture of a cat and a dog on sand"
    -> ("a picture of a cat", "a picture of a dog"). Never empty."""
    first, *rest = phrases(line)
    opening = ""
    if rest and joint(rest[0]) == "of":
        opening, first = f"{first} of ", f"{first} {rest.pop(0)}"
    made = [first]
    for p in rest:
        if joint(p) == "of":
            made[-1] += f" {p}"  # a pot of food
        elif joint(p) in BESIDE and " " in p:
            made.append(opening + p.partition(" ")[2])
    return tuple(dict.fromkeys(made))


def shape(line: str) -> tuple[str, ...]:
    """The joints of a line's phrases, in order."""
    return tuple(joint(p) for p in phrases(line))


def bank(lines: Iterable[str]) -> Bank:
    """A bank of `lines`: spaces made single, empty lines and repeats left out.

    Raises Invalid for no line at all and for a line of more than MAX_WORDS words, naming it; TooLarge for more than
    MAX_LINES lines.
    """
    kept: dict[str, None] = {}
    for number, raw in enumerate(lines, 1):
        if number > MAX_LINES:
            raise TooLarge(f"The bank has more than {MAX_LINES} lines.")
        line = re.sub(r"\s+", " ", raw).strip()
        if not line:
            continue
        if (n := line.count(" ") + 1) > MAX_WORDS or len(line) > MAX_LINE_CHARACTERS:
            raise Invalid(
                f"Line {number} of the bank has {n} words ({len(line)} characters); a candidate has at most "
                f"{MAX_WORDS} ({MAX_LINE_CHARACTERS}). Shorten it: {line[:40]!r}..."
            )
        kept[line] = None
    if not kept:
        raise Invalid("The bank has no line with a word in it. Give at least one candidate per line.")
    return Bank(tuple(kept))


def read(path: Path) -> Bank:
    """The bank in a text file, one line a candidate. Raises as `bank`; NotFound without the file, Invalid if it is not
    UTF-8."""
    if not path.is_file():
        raise NotFound(f"There is no bank {path.name}. Write a text file with one candidate a line.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise Invalid(f"The bank {path.name} is not UTF-8 (byte {e.start}).") from None
    return bank(text.split("\n"))


def shipped() -> Bank:
    """The lab's bank, which the bare base retrieves from."""
    return read(SHIPPED)
