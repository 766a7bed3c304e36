"""An S3-compatible store of the tests' own: a real server on a free port (moto's), its bucket, and who may use it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

BUCKET = "artifacts"


@dataclass
class Store:
    """A running store."""

    url: str
    bucket: str = BUCKET
    env: dict[str, str] = field(default_factory=dict)
    """What a process needs in its environment to use it"""


@contextlib.contextmanager
def running() -> Iterator[Store]:
    """A store with an empty bucket until the block ends. Skips, with the reason, where it is not installed."""
    pytest.importorskip("moto", reason="the S3-compatible store of the tests comes with the group `dev`")
    boto3 = pytest.importorskip("boto3", reason="the client comes with the extra `s3`")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    env = {
        "AWS_ENDPOINT_URL": url, "MLFLOW_S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1", "PATCHBAY_STORE": f"s3://{BUCKET}/sealed",
    }  # fmt: skip
    try:
        _until_up(url, process)
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="tests", aws_secret_access_key="tests"
        )
        client.create_bucket(Bucket=BUCKET)
        yield Store(url, BUCKET, env)
    finally:
        process.kill()
        process.wait()


def _until_up(url: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"moto's server ended with status {process.returncode}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/moto-api/", timeout=2)
            return
        time.sleep(0.1)
    raise TimeoutError(f"moto's server does not answer within {seconds:g} s")
