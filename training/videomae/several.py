"""One of several processes that pre-train together: what `patchbay fit videomae/... processes=N` starts N times.

python -m torch.distributed.run --nproc_per_node=N -m training.videomae.several PART FOLDER

PART holds config.json and pool.npy, and receives net.safetensors; FOLDER keeps the checkpoints that a killed run goes
on from. On CUDA each process has its own device, on a CPU they meet by gloo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from registry import config as configs
from training.videomae.config import Config, plan_of
from training.videomae.pretraining import pretrain


def join(part: Path, folder: Path | None) -> None:
    """Pre-train this process' rows of every batch; the first process writes the weights."""
    from accelerate import Accelerator

    config = configs.parse(Config, json.loads((part / "config.json").read_text()))
    accelerator = Accelerator(cpu=config.device == "cpu")
    pool = torch.from_numpy(np.load(part / "pool.npy", mmap_mode="c"))  # pages are shared between processes
    net, _ = pretrain(pool, config.size, plan_of(config), folder, config.device, accelerator=accelerator)
    if accelerator.is_main_process:
        save_file({k: v.contiguous().cpu() for k, v in net.state_dict().items()}, part / "net.safetensors")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    join(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None)
