"""One picture by two processes, each of which runs the UNet on one half of guidance's batch.

torchrun --nproc-per-node 2 examples/several_processes.py

Without torchrun, one process does all of it.
"""

import argparse
import os
from pathlib import Path

import torch

import difffast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("picture.png"))
arguments = parser.parse_args()

pipe = difffast.models.embedded_pipeline()
options = {}
if int(os.environ.get("WORLD_SIZE", "1")) == 2:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("cfg",))  # on GPUs: "cuda"

report = difffast.patch(pipe, "exact", **options)
seed = torch.Generator().manual_seed(0)  # the same one in both processes
image = pipe("a yellow square and a blue ring", num_inference_steps=arguments.steps, generator=seed).images[0]

if os.environ.get("RANK", "0") == "0":
    print(report, report.last_run, sep="\n")
    image.save(arguments.out)
if options:
    torch.distributed.destroy_process_group()
