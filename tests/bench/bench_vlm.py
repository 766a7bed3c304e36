"""What erasing costs on the lab's vision-language model: base and patched interleaved, 16 rows with 16 lists a batch.

Features are made once, so that what is timed is the decoder with its edits; both have the same tower. Ratios only.
"""

import pytest
import torch

from patches.families.base import load_base
from patches.families.vlm import Picture, PictureDecoder
from patches.mechanisms import erase
from patches.mechanisms.erase import ROW
from patches.subject import Subject
from training.lab import company

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]
ROWS, TOKENS = 16, 24


@pytest.fixture(scope="module")
def seeing():
    base = load_base("lab:vlm", "vlm")
    subject = Subject(base, {"patch": erase.make(base, (0, 1, 2, 3), weight=1.5)})
    yield subject
    subject.close()


def rows(subject, count, lists):
    """Rows of noise pictures; row i erases lists[i] (None: the base)."""
    base = subject.base
    words = "<bos><image><image><image><image>describe :"
    prompt = base.processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    g = torch.Generator().manual_seed(0)
    width = base.model.config.get_text_config().hidden_size
    return [
        Picture(
            prompt, features=0.1 * torch.randn(4, width, generator=g), max_tokens=TOKENS, ignore_eos=True,
            arm="patch" if lists[i] is not None else None, params={ROW: lists[i]} if lists[i] is not None else {},
        )
        for i in range(count)
    ]  # fmt: skip


def run(subject, count, lists):
    jobs = rows(subject, count, lists)
    PictureDecoder(subject.base, subject.applied, slots=count).run(jobs)
    return [j.out for j in jobs]


@pytest.mark.parametrize("count", [1, ROWS])
def bench_erasing(seeing, benchmark, count):
    """One row, and sixteen rows that each erase another list (three objects, four depths), against the base."""
    names = company.company_classes()
    patch = seeing.arms["patch"]
    lists = [patch.directions(seeing.base, names[3 * i : 3 * i + 3]) for i in range(count)]
    plain = [None] * count
    want = run(seeing, count, plain)
    variants = {
        "base": lambda: run(seeing, count, plain),
        "base again": lambda: run(seeing, count, plain),
        "patched": lambda: run(seeing, count, lists),
        "half of each": lambda: run(seeing, count, [x if i % 2 else None for i, x in enumerate(lists)]),
    }
    times = interleave(variants, rounds=24, warmup=3)
    assert run(seeing, count, plain) == want
    out = {name: ratio(t, times["base"]) for name, t in times.items()}
    benchmark.pedantic(variants["patched"], rounds=3)
    benchmark.extra_info.update(rows=count, ratios={k: vars(v) for k, v in out.items()})
    print(f"\n{count} rows:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})
    print(f"throughput of the base: {1 / out['patched'].median:.3f}")
