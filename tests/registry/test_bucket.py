import pytest

from patches import artifact
from patches.mechanisms.sink import SinkEdit
from registry import bucket, kept, manifest
from registry.errors import ConfigError, NotReady, Tampered
from tests import s3
from tests.bentos.conftest import CONFIGS, SYSTEM


@pytest.fixture(scope="module")
def server():
    with s3.running() as running:
        yield running


@pytest.fixture
def there(server, monkeypatch, request):
    """The store as this process's, with a prefix of the test's own."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATCHBAY_STORE", f"s3://{server.bucket}/{abs(hash(request.node.name))}")
    bucket._client.cache_clear()
    yield server
    bucket._client.cache_clear()


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir()
    (folder / "cards").mkdir()
    (folder / "cards" / "a.json").write_text("{}")
    return folder, artifact.save(SinkEdit(CONFIGS[0], {}), SYSTEM, folder, base="tiny@" + "0" * 64).digest


def test_what_was_pushed_is_pulled_by_digest_on_a_host_without_mlflow(there, sealed, home):
    folder, digest = sealed
    assert bucket.put(folder, digest)
    assert not bucket.put(folder, digest)  # once is enough
    got = kept.find(digest)
    assert got == home / "artifacts" / digest
    assert manifest.read(got, digest=digest).files.keys() == {"cards/a.json"} | manifest.read(folder).files.keys()
    assert kept.find("0" * 64) is None


@pytest.mark.parametrize("name", ["manifest.json", "cards/a.json"])
def test_what_was_changed_in_the_store_is_refused(there, sealed, home, name):
    folder, digest = sealed
    bucket.put(folder, digest)
    at = bucket.address()
    other = (folder / "manifest.json").read_bytes().replace(b'"kind":"patch"', b'"kind":"model"')
    body = b'{"changed": true}' if name != "manifest.json" else other
    bucket._client().put_object(Bucket=at.bucket, Key=at.key(digest, name), Body=body)
    with pytest.raises(Tampered):
        kept.find(digest)
    assert not (home / "artifacts" / digest).exists()
    assert not [f for f in (home / "artifacts").iterdir() if not f.name.startswith(".part-") or list(f.iterdir())]


def test_a_folder_half_put_is_not_there_yet(there, sealed):
    folder, digest = sealed
    at = bucket.address()
    bucket._client().upload_file(str(folder / "cards" / "a.json"), at.bucket, at.key(digest, "cards/a.json"))
    assert kept.find(digest) is None
    assert bucket.put(folder, digest)  # and is put whole by who tries again
    assert kept.find(digest) is not None


def test_a_store_that_lacks_a_file_or_is_away_says_so(there, sealed, monkeypatch):
    folder, digest = sealed
    bucket.put(folder, digest)
    at = bucket.address()
    bucket._client().delete_object(Bucket=at.bucket, Key=at.key(digest, "cards/a.json"))
    with pytest.raises(NotReady, match="PATCHBAY_STORE"):
        kept.find(digest)
    monkeypatch.setenv("PATCHBAY_STORE", "s3://nobody-made-this")
    with pytest.raises(NotReady, match="NoSuchBucket"):
        kept.find(digest)


@pytest.mark.parametrize(
    "text", ["/tmp/x", "s3://", "s3://UPPER/x", "s3://a/../b", "https://a.example/x", "s3://b/x y"]
)
def test_what_is_no_address_is_refused(text, monkeypatch):
    monkeypatch.setenv("PATCHBAY_STORE", text)
    with pytest.raises(ConfigError, match="s3://bucket"):
        bucket.address()


def test_a_carried_folder_is_used_where_it_lies_and_verified(sealed, home):
    folder, digest = sealed
    assert kept.find(digest, [folder]) == folder
    assert not (home / "artifacts").exists()
    (folder / "cards" / "a.json").write_text("{ }")
    with pytest.raises(Tampered):
        kept.find(digest, [folder])
