"""Server side: torchrun --standalone --nproc-per-node 2 examples/torchrun_server.py; trainer beside it."""

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import weightbus

device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(device)
parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

with weightbus.Subscriber(model) as subscriber:
    subscriber.serve()  # installs each update in place; returns when the trainer leaves
    print(f"rank {mesh.get_rank()} serves version {subscriber.version}")

torch.distributed.destroy_process_group()
