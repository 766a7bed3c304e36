"""Candidates out of what models say, and nothing out of what is none."""

import pytest

from patches.families.search.parse import candidate, candidates


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("1. a cat on sand\n2) a dog!\n10: a 'sea'", ["a cat on sand", "a dog", "a 'sea"]),
        ('Here are more:\n- a cat.\n* "a dog"\n', ["a cat", "a dog"]),
        ('["a cat", "a dog"]', ["a cat", "a dog"]),
        ('Sure! [{"text": "a cat", "score": 0.4}]', ["a cat"]),
        ("1. 0.412: a cat\n2. a cat\n1234. a dog", ["a cat", "a dog"]),
        ("a cat on sand\na dog", ["a cat on sand", "a dog"]),
        ("", []),
        ("1.\n2.\n3.", []),
        ("??? 123 \ufffd", []),
        ("<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", []),
        ("<html>\nline one\nline two", []),
        ("1. a cat<|im_end|>\n", ["a cat"]),
    ],
)
def test_candidates_of_an_answer(answer, want):
    assert candidates(answer, 10) == want


def test_a_candidate_is_cut_to_its_words():
    assert candidate("1. " + "word " * 1000, 5) == "word word word word word"
