"""A small diffusion-like pipeline as an engine runs it, and every way to give it new weights.

    torchrun --standalone --nproc-per-node 2 examples/engine.py

Two tensor-parallel ranks hold a text encoder, a transformer and a VAE, and make an image-like tensor of noise
in a few steps. Ten lines make them updatable (marked below): from a trainer over the process group, from disk,
from tensors in a request, each checked by SHA-256 over HTTP.
Needs ``pip install 'weightbus[http]'``, safetensors and httpx.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import weightbus

HUB = os.environ.get("WEIGHTBUS_ADDRESS", "tcp://127.0.0.1:5761")
PORT = int(os.environ.get("WEIGHTBUS_HTTP_PORT", "5781"))
WIDTH, WORDS, PIXELS, STEPS = 64, 100, 8 * 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def pipeline() -> dict[str, nn.Module]:
    """Text encoder, denoising transformer, decoder of latents to pixels."""
    return {
        "text_encoder": nn.Sequential(nn.Embedding(WORDS, WIDTH), Block()),
        "transformer": nn.Sequential(Block(), Block()),
        "vae": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3 * PIXELS)),
    }


def shard(modules: dict[str, nn.Module], mesh: DeviceMesh) -> None:
    """Columns of the first and rows of the second matrix of each block: tensor parallelism as in Megatron."""
    for module in modules.values():
        for child in module.modules():
            if isinstance(child, Block):
                parallelize_module(child, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class Engine:
    """Generates, and between two images takes part in what waits."""

    def __init__(self, rank: int, size: int) -> None:
        self.modules = pipeline()
        shard(self.modules, init_device_mesh("cpu", (size,)))
        self.paused = False
        # The ten lines: one object for all routes, and between images one call of it (see ``serve``).
        self.subscriber = weightbus.Subscriber(
            self.modules,
            address=HUB,
            rank=rank,
            replica_size=size,
            cpu_group=dist.group.WORLD,
            agree=self.agree,
            on_update=lambda version: setattr(self, "paused", True),
            on_commit=lambda version: setattr(self, "paused", False),
        )

    def agree(self, waiting: bool) -> bool:
        """Whether any rank has seen a request, so that all take part between the same two images."""
        flag = torch.tensor(int(waiting))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    @torch.no_grad()
    def generate(self, prompt: list[int], seed: int = 0) -> Tensor:
        """An image of shape (3, 8, 8), the same on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        text = self.modules["text_encoder"](torch.tensor(prompt)).mean(0)
        latent = torch.randn(WIDTH, generator=generator)
        for _ in range(STEPS):
            latent = latent - 0.1 * self.modules["transformer"](latent + text)
        return self.modules["vae"](latent).reshape(3, 8, 8)

    def serve(self, images: list[Tensor]) -> None:
        """Until all ranks know that the trainer has left."""
        while not self.agree(self.subscriber.left):
            self.subscriber.poll(timeout_s=0.02)
            images.append(self.generate([1, 2, 3]))


def routes() -> threading.Thread:
    """The HTTP routes, in rank 0's process; an engine with an app of its own includes ``http.router`` in it."""
    import uvicorn

    from weightbus import http

    app = http.create_app(HUB, roots=[tempfile.gettempdir()])
    thread = threading.Thread(
        target=uvicorn.run, args=(app,), kwargs={"port": PORT, "log_level": "error"}, daemon=True
    )
    thread.start()
    return thread


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    driver = None
    if rank == 0:
        routes()
        driver = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, __file__, "drive"], env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
        )
    images: list[Tensor] = []
    engine = Engine(rank, size)
    engine.serve(images)
    engine.subscriber.close()
    distinct = {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images}
    if driver is not None and driver.wait(30) == 0:
        print(f"generated {len(images)} images of {len(distinct)} sets of weights")
    dist.destroy_process_group()


# -- the other side: a trainer, and a client of the routes -------------------------------------------------


def manifest(module: nn.Module) -> dict[str, str]:
    """SHA-256 of each tensor, as SGLang's checker expects them."""
    return weightbus.named_sha256(module)


def drive() -> None:
    """New weights over each path; each is checked through HTTP."""
    import httpx
    from safetensors.torch import save

    client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60)

    def post(path: str, **body: object) -> str:
        answer = client.post(path, json=body).json()
        if not answer["success"]:
            raise SystemExit(f"{path}: {answer['message']}")
        return str(answer["message"])

    def check(modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            post(
                "/update_weights_from_tensor_checker",
                target_module=name,
                expected_named_tensors_sha256=manifest(module),
            )

    modules = pipeline()
    with weightbus.Publisher(modules, address=HUB, rank=0, size=1) as publisher:
        print("group:", publisher.update(1))
        check(modules)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "version-2"
            with torch.no_grad():
                for module in modules.values():
                    for parameter in module.parameters():
                        parameter.mul_(1.5)
            print("save:", publisher.save(folder, version=2))
            print("disk:", post("/update_weights_from_disk", model_path=str(folder)))
            check(modules)
        with torch.no_grad():
            modules["transformer"][0].up.weight.neg_()
        tensors = {name: tensor.detach() for name, tensor in modules["transformer"].state_dict().items()}
        payload = base64.b64encode(save(tensors)).decode()
        print(
            "tensors:",
            post("/update_weights_from_tensor", serialized_named_tensors=[payload], weight_version=3),
        )
        check(modules)
        time.sleep(0.2)  # an image with these weights


if __name__ == "__main__":
    drive() if sys.argv[1:] == ["drive"] else main()
