"""Trainer side: torchrun --standalone --nproc-per-node 2 examples/torchrun_trainer.py; servers beside it."""

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weightbus

device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
model = fully_shard(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(device), mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())

with weightbus.Publisher(model) as publisher:
    for step in range(1, 4):
        model(torch.randn(8, 64, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        report = publisher.update(version=step)  # all trainer ranks call it; raises unless every rank has it
        if mesh.get_rank() == 0:
            print(report)

torch.distributed.destroy_process_group()
