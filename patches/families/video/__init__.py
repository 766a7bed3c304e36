"""Video: VideoMAE (transformers' classes) and Toto (a Llama over visual tokens), clips in, one interface out."""

from patches.families.family import Family
from patches.families.video.base import SITES, knows, load, load_folder, read, save, tiny, tiny_masked, tiny_tokens
from patches.families.video.model import MaskedVideo, VideoModel
from patches.families.video.planted import PURPOSES
from patches.families.video.predict import predict
from patches.families.video.table import TABLE
from patches.families.video.tokens import Codebook, TokenVideo
from patches.families.video.untrained import llama
from patches.families.video.worker import Clip, VideoWorker, made

__all__ = [
    "FAMILY", "SITES", "Clip", "Codebook", "MaskedVideo", "TokenVideo", "VideoModel", "VideoWorker", "llama", "load",
    "load_folder", "read", "save", "tiny", "tiny_masked", "tiny_tokens",
]  # fmt: skip

FAMILY = Family(
    name="video",
    load=load,
    tiny=tiny,
    worker=made,
    table=TABLE,
    predict=predict,
    example="lab:video-natural",
    purposes=PURPOSES,
    sites=SITES,
    load_folder=load_folder,
    engine="patches.families.video.onnx",
    knows=knows,
)
