"""What steerability and the training of dictionaries cost; every ratio from one interleaved run."""

import pytest
import torch
import torch.nn.functional as nnf

from patches.engine.read import record
from patches.families import clip
from patches.families.base import load_base
from patches.mechanisms.features import SAE, edit
from training.clip_sae.dictionary import Dictionary, SAEConfig
from training.clip_sae.steerability import after_last_block, probabilities
from training.clip_sae.train import across_rows, train_step

from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(2)
    base = load_base("lab:clip", "clip")
    base.model.requires_grad_(False)
    return base


def dictionary(width, features, activation="relu", seed=0):
    g = torch.Generator().manual_seed(seed)
    W = nnf.normalize(torch.randn(features, width, generator=g), dim=1)
    threshold = torch.full((features,), 3.0) if activation == "jumprelu" else None
    return SAE(W, torch.zeros(features), W, torch.zeros(width), activation, 32 * (activation == "topk"), threshold)


@torch.inference_mode()
def bench_steerability(base, benchmark):
    """A whole last-layer dictionary in closed form, against a full forward with the patch per feature; per feature."""
    images, words = torch.randn(16, 3, 96, 96), nnf.normalize(torch.randn(500, 256), dim=1)
    site, sae = clip.site("block", 7), dictionary(256, 4096, "jumprelu")
    with record(base.model, [site]) as acts:
        base.model(image=images)
    cls, scale = acts[site][0][:, 0], clip.logit_scale(base)
    f, few = sae.encode(cls), 3
    before = probabilities(base.model(image=images)["image_features"], words, scale).mean(0)

    def forward():
        out = []
        for j in range(few):
            with edit(sae, site, [j], "clamp", 20.0).apply(base.model):
                out.append(probabilities(base.model(image=images)["image_features"], words, scale).mean(0) - before)
        return torch.stack(out).square().sum(1)

    def closed():
        return after_last_block(base, cls, sae.decoder, f, 20.0, words).score

    torch.testing.assert_close(closed()[:few], forward(), atol=1e-5, rtol=1e-3)
    times = interleave({"closed": closed, "forward": forward}, 5, warmup=1)
    got = ratio([t / few for t in times["forward"]], [t / len(sae.bias) for t in times["closed"]])
    benchmark.pedantic(closed, rounds=1)
    benchmark.extra_info.update(ratios={"closed over forward": {"median": 1 / got.median}}, speedup=vars(got))
    print(
        f"\nsteerability, per feature: {got.median:.0f} [{got.low:.0f}, {got.high:.0f}] times the full forward's speed"
    )
    assert got.median >= 300


@pytest.mark.parametrize("method", ["topk", "batchtopk"])
def bench_training(benchmark, method):
    """A step on 4,096 tokens of width 256, 4,096 features, k 32: ours, and the same maths with dense activations."""
    torch.set_num_threads(2)
    x = torch.randn(4096, 256)
    config = SAEConfig(method=method, dead="leave")
    ours, dense = (Dictionary(config, 256) for _ in range(2))
    for model in (ours, dense):
        model.start(x)
    opts = {m: torch.optim.Adam(m.parameters(), 1e-4, fused=True) for m in (ours, dense)}

    def finish(model, loss):
        opts[model].zero_grad(set_to_none=True)
        loss.backward()
        across_rows(model.decoder)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opts[model].step()
        with torch.no_grad():
            model.decoder.div_(model.decoder.norm(dim=1, keepdim=True))

    def sparse():
        finish(ours, ours(x)[0])

    def plain():
        n = dense.normal(x)
        pre = n @ dense.encoder.T + dense.bias
        if method == "topk":
            top = pre.topk(config.k, 1)
            f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        else:
            top = pre.relu().flatten().topk(config.k * len(x))
            f = torch.zeros(pre.numel()).scatter(0, top.indices, top.values).view_as(pre)
        left = n - (f @ dense.decoder + dense.decoder_bias)
        finish(dense, left.square().sum() / (n - n.mean(0)).square().sum())

    times = interleave({"dense": plain, "sparse": sparse}, 8, warmup=2)
    got = ratio(times["dense"], times["sparse"])
    benchmark.pedantic(sparse, rounds=2)
    rate = len(x) / sorted(times["sparse"])[len(times["sparse"]) // 2]
    benchmark.extra_info.update(throughput={"sparse": vars(got)}, tokens_per_s=rate)
    print(f"\n{method}: {got.median:.2f} [{got.low:.2f}, {got.high:.2f}] times dense, {rate:.0f} tokens/s")


def bench_training_beside_saelens(benchmark):
    """A whole step of TopK training, ours and SAELens' own trainer: 4,096 tokens of width 256, 4,096 features, k 32,
    nothing dead. SAELens is no dependency of ours: put it where Python finds it."""
    pytest.importorskip("sae_lens")
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.set_num_threads(2)
    x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    config = SAEConfig(method="topk", features=4096, k=32)
    ours = Dictionary(config, 256)
    ours.start(x)
    optimizer = torch.optim.Adam(ours.parameters(), config.lr, fused=True)
    variants = {"ours": lambda: train_step(ours, ours, optimizer, x, config, 0, None)}
    # its sparse activations are for a GPU: on a CPU their backward is not implemented
    about = TopKTrainingSAEConfig(d_in=256, d_sae=4096, k=32, use_sparse_activations=False)
    trainer = SAETrainer(SAETrainerConfig(10**9, 4096, lr_end=3e-5), TopKTrainingSAE(about), iter([x]))
    variants["SAELens"] = lambda: trainer._train_step(sae=trainer.sae, sae_in=x)
    times = interleave(variants, 10, warmup=2)
    out = {name: ratio(t, times["ours"]) for name, t in times.items()}
    benchmark.pedantic(variants["ours"], rounds=2)
    benchmark.extra_info.update(ratios={k: vars(v) for k, v in out.items()})
    print(f"\nstep, ours = 1: { {k: f'{v.median:.2f} [{v.low:.2f}, {v.high:.2f}]' for k, v in out.items()} }")
