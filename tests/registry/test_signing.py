"""Signatures: what was signed verifies, any byte that differs does not, and where signers are named nothing passes."""

import json
import shutil
from pathlib import Path

import pytest

from registry import cli, manifest, signing
from registry.ab.ledger import Ledger
from registry.errors import ConfigError, Unsigned
from registry.home import home
from registry.signing import signers

pytest.importorskip("model_signing")
SEALED = Path(manifest.__file__).parents[1] / "patches" / "lab" / "sealed" / "mils"


def keys(folder, name):
    """A new pair of keys: private and public file."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(name="sealed")
def _sealed(tmp_path):
    """A small sealed folder, two pairs of keys, and its bundle by the first."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    (folder / "note.txt").write_text("hello")
    manifest.write(folder, kind="patch", system="clip_heads", base=f"lab:clip@{'a' * 64}", config={})
    mine, theirs = keys(tmp_path, "mine"), keys(tmp_path, "theirs")
    return folder, mine, theirs, signing.sign(folder, mine[0])


def test_who_signed_is_told_and_nobody_else_is_believed(sealed):
    folder, (_, public), (_, other), bundle = sealed
    assert signing.verify(folder, [bundle], [str(other), str(public)]) == str(public)
    with pytest.raises(Unsigned, match="believes"):
        signing.verify(folder, [bundle], [str(other)])
    with pytest.raises(Unsigned, match="no signature"):
        signing.verify(folder, [], [str(public)])
    said = json.loads(bundle.read_text())
    assert said["mediaType"].startswith("application/vnd.dev.sigstore.bundle")


def test_a_bundle_names_the_manifest_whose_sha256_is_the_digest(sealed):
    import base64

    folder, _, _, bundle = sealed
    statement = json.loads(base64.b64decode(json.loads(bundle.read_text())["dsseEnvelope"]["payload"]))
    named = {r["name"]: r["digest"] for r in statement["predicate"]["resources"]}
    assert named["manifest.json"] == manifest.read(folder).digest


def test_a_bundle_signs_no_other_artifact_and_no_changed_one(sealed, tmp_path):
    folder, (_, public), _, bundle = sealed
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "manifest.json").unlink()
    (other / "note.txt").write_text("hallo")
    manifest.write(other, kind="patch", system="clip_heads", base=f"lab:clip@{'a' * 64}", config={})
    with pytest.raises(Unsigned):  # properly sealed, and signed by nobody
        signing.verify(other, [bundle], [str(public)])
    broken = tmp_path / "broken.sig"
    said = json.loads(bundle.read_text())
    said["dsseEnvelope"]["payload"] = said["dsseEnvelope"]["payload"][:-8] + "AAAAAAA="
    for text in ("", "{}", bundle.read_text()[:-40], json.dumps(said)):
        broken.write_text(text)
        with pytest.raises(Unsigned):
            signing.verify(folder, [broken], [str(public)])


def test_signers_that_cannot_be_read_are_an_error_and_not_nobody(tmp_path):
    assert signers({}) == ()
    for wrong in (str(tmp_path / "none.pem"), "sigstore:me@example.org"):
        with pytest.raises(ConfigError, match="PATCHBAY_SIGNERS"):
            signers({"PATCHBAY_SIGNERS": wrong})
    assert signers({"PATCHBAY_SIGNERS": "sigstore:me@example.org@https://issuer.example"})


def test_without_the_library_the_extra_is_named(sealed, monkeypatch):
    folder, (private, public), _, bundle = sealed
    monkeypatch.setattr(signing, "LIBRARY", "no_such_library")
    for refused in (lambda: signing.sign(folder, private), lambda: signing.verify(folder, [bundle], [str(public)])):
        with pytest.raises(ConfigError, match=r"patchbay\[signing\]"):
            refused()


def test_from_push_to_promotion_with_a_signer_and_all_of_it_in_the_audit(tmp_path, monkeypatch, capsys):
    (private, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "theirs")
    digest = manifest.read(SEALED).digest

    def run(*words):
        code = cli.main([str(w) for w in words])
        return code, "".join(capsys.readouterr())

    assert run("push", SEALED)[0] == 0
    monkeypatch.setenv("PATCHBAY_SIGNERS", str(public))
    code, said = run("promote", "mils", "--force", "tired of waiting")
    assert code == 1
    assert "signed by nobody" in said
    assert Ledger().head("mils").champion == "base"
    assert run("sign", "mils@challenger")[0] == 2
    assert run("sign", "mils@challenger", "--key", private)[0] == 0
    shutil.rmtree(home() / "signatures")  # another host: the store has it
    assert run("verify", "mils@challenger")[0] == 0
    assert run("verify", "mils@challenger", "--signer", other)[0] == 1
    assert run("promote", "mils", "--force", "measured elsewhere")[0] == 0
    assert Ledger().head("mils").champion == digest
    code, said = run("audit", "mils")
    assert code == 0
    assert [line.split()[3] for line in said.splitlines()[1:3]] == ["sign", "promote"]
    assert "measured elsewhere" in said
    assert "challenge" not in said
    assert "challenge" in run("audit", "mils", "--all")[1]
    code, said = run("export", "mils@champion", "--as", "card", "--out", tmp_path / "card.md")
    assert code == 0
    text = (tmp_path / "card.md").read_text()
    assert ".sig" in text
    assert digest in text
