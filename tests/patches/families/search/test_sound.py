"""Sounds: WAVE files of every layout, and CLAP in the hub's layout as a scorer."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest
import torch

from patches.families.base import load_base
from patches.families.search import sound, wav
from registry.errors import Invalid, NotFound, TooLarge

TONE = torch.linspace(0, 200, 4000).sin() * 0.8


def packed(kind, channels, rate, bits, body):
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 0, b"WAVE", b"fmt ", 16, kind, channels, rate, 0, 0, bits)
    return head + b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"data" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("kind", "bits", "made"),
    [
        (1, 8, lambda x: ((x * 127) + 128).round().astype(np.uint8)),
        (1, 16, lambda x: (x * 32767).round().astype("<i2")),
        (1, 32, lambda x: (x * (2**31 - 1)).round().astype("<i4")),
        (3, 32, lambda x: x.astype("<f4")),
        (3, 64, lambda x: x.astype("<f8")),
    ],
)
def test_every_sample_format_is_read(kind, bits, made):
    x = TONE.double().numpy()
    both = np.stack([x, -0.5 * x], 1)
    samples, rate = wav.decode(packed(kind, 2, 16000, bits, made(both).tobytes()))
    assert rate == 16000
    assert torch.allclose(samples, TONE * 0.25, atol=0.01)


def test_24_bits_and_the_standard_librarys_own_files_are_read():
    x = (TONE.numpy() * (2**23 - 1)).round().astype("<i4")
    body = x.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    assert torch.allclose(wav.decode(packed(1, 1, 8000, 24, body))[0], TONE, atol=1e-4)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes((TONE.numpy() * 32767).astype("<i2").tobytes())
    assert torch.allclose(wav.decode(file.getvalue())[0], TONE, atol=1e-4)
    assert torch.allclose(wav.decode(wav.encode(TONE, 8000))[0], TONE, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(20), Invalid, "no WAVE file"),
        (b"", Invalid, "no WAVE file"),
        (packed(1, 1, 8000, 16, b""), Invalid, "no sample"),
        (packed(6, 1, 8000, 8, bytes(10)), Invalid, "format 6"),
        (packed(1, 0, 8000, 16, bytes(10)), Invalid, "0 channels"),
        (packed(3, 1, 8000, 32, np.array([np.nan] * 4, "<f4").tobytes()), Invalid, "not finite"),
        (packed(1, 1, 1000, 8, bytes(70_000)), TooLarge, "lasts 70 s"),
        (packed(1, 1, 8000, 16, bytes(8))[:30], Invalid, "cut off"),
    ],
)
def test_what_is_no_sound_is_refused_in_words(data, error, says):
    with pytest.raises(error, match=says):
        wav.decode(data)


def test_resampling_keeps_a_tone():
    t = torch.arange(16000) / 16000
    got = wav.resampled((2 * torch.pi * 440 * t).sin(), 16000, 8000)
    want = (2 * torch.pi * 440 * torch.arange(8000) / 8000).sin()
    assert torch.allclose(got[500:-500], want[500:-500], atol=0.02)


def test_a_clap_of_the_hubs_layout_scores_texts_against_a_sound(tmp_path):
    model, ears = sound.small("a sound of bell horn low high".split())  # noqa: SIM905
    sound.save(model, ears, tmp_path)
    base = load_base(f"local-dir:{tmp_path}", "search")
    assert base.digest == load_base(f"local-dir:{tmp_path}", "search").digest
    scorer = sound.Clap(base)
    target = scorer.target({"sound": (TONE, 8000)})
    texts = ["a sound of a bell", "a sound of a low horn", "a high bell"]
    scores = scorer(target, texts)
    assert all(-1 <= s <= 1 for s in scores)
    assert len(set(scores)) == 3
    assert scorer(target, texts[::-1]) == scores[::-1]
    # by the library's own way: one text, unpadded batch
    ids = ears.tokenizer([texts[1]], return_tensors="pt")
    with torch.inference_mode():
        x = base.model.get_audio_features(input_features=base.processor.sound(TONE, 8000)).pooler_output
        y = base.model.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
        want = torch.nn.functional.cosine_similarity(x, y).item()
    assert scores[1] == pytest.approx(want, abs=1e-5)
    with pytest.raises(Invalid, match="listens to sounds"):
        scorer.target({"pixels": torch.zeros(1, 3, 8, 8)})


def test_a_folder_without_a_clap_says_what_is_missing(tmp_path):
    with pytest.raises(NotFound, match=r"config\.json"):
        load_base(f"local-dir:{tmp_path}", "search")
    with pytest.raises(NotFound, match="audio-text model"):
        load_base("somewhere", "search")
