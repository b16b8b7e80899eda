"""The routes of engines over HTTP: real servers under tensor parallelism, and every kind of bad request."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time

import httpx
import torch
import torch.distributed as dist
import uvicorn
from pipeline import SHAPES, drawn, fill, pipeline, shard, versions_held, write_pipeline
from processes import Job, free_port, run_jobs
from safetensors.torch import save

import weightbus
from weightbus.tools.http import app as http

TOKEN = "a secret"  # noqa: S105 - guards nothing


def encode(tensors):
    return base64.b64encode(save(tensors)).decode()


def flattened(tensors):
    entries, flat, at = [], [], 0
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).contiguous().view(torch.uint8)
        entries.append(
            {
                "name": name,
                "dtype": str(tensor.dtype),
                "shape": list(tensor.shape),
                "start_idx": at,
                "end_idx": at + raw.numel(),
                "numel": raw.numel(),
            }
        )
        at += raw.numel()
        flat.append(raw)
    data = save({"flattened_tensor": torch.cat(flat)}, {"flattened_metadata": json.dumps(entries)})
    return base64.b64encode(data).decode()


def server(rank, size, *, address):
    dist.init_process_group("gloo", rank=rank, world_size=size)
    modules = pipeline(rank, size)
    seen = []
    subscriber = weightbus.Subscriber(
        modules,
        address=address,
        rank=rank,
        replica_size=size,
        cpu_group=dist.group.WORLD,
        on_commit=lambda version: seen.append((version, versions_held(modules, rank, size))),
    )
    with subscriber:
        subscriber.serve()
        state = subscriber.state, subscriber.version
    dist.destroy_process_group()
    return seen, state, versions_held(modules, rank, size)


class Web:
    """A server in a thread, and a client of it."""

    def __init__(self, app, token=None):
        port = free_port()
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def post(self, path, **body):
        answer = self.client.post(path, json=body)
        return answer.status_code, answer.json()


def sha256(tensor):
    data = f"torch.{str(tensor.dtype)[6:]}{tuple(tensor.shape)!r}".encode()
    return hashlib.sha256(data + tensor.contiguous().numpy().tobytes()).hexdigest()


def checksum(module, version, size=2):
    """Computed here from the whole tensors: each rank's digest of its shards, then the digest of these."""
    digests = []
    for rank in range(size):
        hasher = hashlib.sha256()
        for name, tensor in sorted(drawn(version)[module].items()):
            hasher.update(name.encode() + shard(name, tensor, rank, size).contiguous().numpy().tobytes())
        digests.append(hasher.hexdigest())
    same = len(set(digests)) == 1
    return digests[0] if same else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def flows(rank, size, *, address, good, bad, outside):
    """The four flows, each with its counterpart that must fail; returns (status, answer) by what was asked."""
    modules = pipeline()
    fill(modules, 1)
    calls, found = [], {}
    engine = http.Engine(
        pause=lambda mode: calls.append(f"pause {mode}"),
        resume=lambda: calls.append("resume"),
        flush_cache=lambda: calls.append("flush"),
    )
    app = http.create_app(address, token=TOKEN, roots=[good.parent], engine=engine, wait_s=10, run_s=30)
    two, three = drawn(2), drawn(3)
    with (
        weightbus.Publisher(modules, address=address, rank=rank, size=size, join_timeout_s=40) as publisher,
        Web(app, TOKEN) as web,
    ):

        def ask(what, path, **body):
            found[what] = web.post(path, **body)

        def check(what, version, module="transformer"):
            expected = {name: sha256(tensor) for name, tensor in drawn(version)[module].items()}
            ask(what, checker, target_module=module, expected_named_tensors_sha256=expected)

        checker, tensor, disk = (
            "/update_weights_from_tensor_checker",
            "/update_weights_from_tensor",
            "/update_weights_from_disk",
        )
        publisher.update(1)
        found["version 1"] = web.client.get("/weight_version").json()
        found["health"] = web.client.get("/health").status_code
        # From tensors, then the checker; whole tensors, and a digest of each rank's shard.
        ask("one payload", tensor, serialized_named_tensors=[encode(two["transformer"])], weight_version=2)
        check("checker", 2)
        of_ranks = [
            {name: sha256(shard(name, t, r, 2)) for name, t in two["transformer"].items()} for r in (0, 1)
        ]
        ask("by ranks", checker, target_module="transformer", expected_named_tensors_sha256=of_ranks)
        check("mismatch", 3)
        ask("swapped", checker, target_module="transformer", expected_named_tensors_sha256=of_ranks[::-1])
        ask("three", checker, target_module="transformer", expected_named_tensors_sha256=[of_ranks[0]] * 3)
        # Checksums change, and are what this process computes.
        ask("checksum", "/get_weights_checksum")
        ask("vae by name", tensor, serialized_named_tensors=[{"vae": flattened(two["vae"])}],
            load_format="flattened_bucket", flush_cache=False)  # fmt: skip
        ask("checksum after", "/get_weights_checksum", module_names=["vae"])
        ask("no such module", "/get_weights_checksum", module_names=["unet"])
        # One payload for each rank: here both are whole, and equal.
        both = {"text_encoder": encode(two["text_encoder"])}
        ask("two payloads", tensor, serialized_named_tensors=[both, both])
        ask("three payloads", tensor, serialized_named_tensors=[both, both, both])
        ask(
            "ambiguous",
            tensor,
            serialized_named_tensors=[encode(two["vae"])],
            target_modules=["vae", "text_encoder"],
        )
        ask("pickled", tensor, serialized_named_tensors=[base64.b64encode(b"\x80\x04K\x01.").decode()])
        ask("not base64", tensor, serialized_named_tensors=["?"])
        ask("unknown name", tensor, serialized_named_tensors=[encode({"qkv.bias": torch.zeros(3)})])
        ask(
            "truncated",
            tensor,
            serialized_named_tensors=[base64.b64encode(save(two["transformer"])[:-8]).decode()],
        )
        # From disk, and a failure in the second module; the snapshot says that nothing changed.
        ask("snapshot", "/weights_checker", action="snapshot")
        ask("bad disk", disk, model_path=str(bad))
        ask("outside", disk, model_path=str(outside))
        ask("link", disk, model_path=str(good.parent / "link"))
        ask("link in", disk, model_path=str(good.parent / "linked"))
        ask("unchanged", "/weights_checker", action="compare")
        ask("disk", disk, model_path=str(good), target_modules=["transformer", "vae"])
        found["version 3"] = web.client.get("/weight_version").json()
        ask("changed", "/weights_checker", action="compare")
        ask("distributed", "/update_weights_from_distributed", names=[])
        ask("group", "/init_weights_update_group")
        ask("pause", "/pause_generation", mode="retract")
        ask("continue", "/continue_generation")
        ask("reset", "/weights_checker", action="reset_tensors")
        found["torn"] = web.client.get("/health").status_code
        ask("partly", tensor, serialized_named_tensors=[encode(three["transformer"])])
        ask("mended", disk, model_path=str(good))
        found["mended health"] = web.client.get("/health").json()
        found["no token"] = httpx.post(f"{web.client.base_url}/get_weights_checksum", json={}).status_code
    return found, calls


def test_the_four_flows_under_tensor_parallelism(address, tmp_path):
    root = tmp_path / "models"
    good = write_pipeline(root / "good", 3)
    bad = write_pipeline(root / "bad", 3)
    raw = bytearray((bad / "vae" / "part-0.safetensors").read_bytes())
    raw[-1] ^= 1
    (bad / "vae" / "part-0.safetensors").write_bytes(raw)
    outside = write_pipeline(tmp_path / "outside", 3)
    (root / "link").symlink_to(outside)
    linked = write_pipeline(root / "linked", 3)
    (linked / "vae" / "part-0.safetensors").unlink()
    (linked / "vae" / "part-0.safetensors").symlink_to(outside / "vae" / "part-0.safetensors")
    ((found, calls),), servers = run_jobs(
        Job(
            run=flows,
            arguments={"address": address, "good": good, "bad": bad, "outside": outside},
        ),
        Job(run=server, size=2, arguments={"address": address}),
        timeout_s=90,
    )
    expected = {
        "one payload": (200, "load of tensors: unverified on 2 ranks"),
        "checker": (200, "verified SHA-256 of 3 tensors on 2 ranks"),
        "by ranks": (200, "verified SHA-256 of 3 tensors on 2 ranks"),
        "mismatch": (
            400,
            "3 mismatching: norm.weight (rank 0, 1), out.weight (rank 0, 1), qkv.weight (rank 0, 1)",
        ),
        "swapped": (400, "2 mismatching: out.weight (rank 0, 1), qkv.weight (rank 0, 1)"),
        "three": (400, "or a list of 1 or 2; got 3 of them"),
        "vae by name": (200, "load of tensors: unverified on 2 ranks"),
        "no such module": (400, "unet: expected a module among transformer, vae, text_encoder"),
        "two payloads": (200, "load of tensors"),
        "three payloads": (400, "expected 1 for all ranks or 2, one for each, got 3"),
        "ambiguous": (
            400,
            "expected {module: payload} where it could be for several of ['vae', 'text_encoder']",
        ),
        "pickled": (400, "got a pickle, which is never loaded here; send safetensors.torch.save"),
        "not base64": (400, "serialized_named_tensors.0: expected base64"),
        "unknown name": (400, "transformer.qkv.bias: unknown name"),
        "truncated": (400, "truncated"),
        "snapshot": (200, "snapshot: rank 0: 6 tensors; rank 1: 6 tensors"),
        "bad disk": (400, "vae.decoder.weight: expected grid61:"),
        "outside": (400, f"{outside}: expected what can be read in {root}, got no such"),
        "link": (400, f"{root / 'link'}: expected what can be read in {root}, got no such"),
        "link in": (400, f"part-0.safetensors: expected what can be read in {root}, got no such"),
        "unchanged": (200, "rank 1: 0 of 6 tensors changed"),
        "disk": (200, "verified on 2 ranks"),
        "changed": (400, "5 of 6 tensors changed"),
        "distributed": (400, "Publisher(model).update(version)"),
        "group": (400, "Publisher(model).update(version)"),
        "pause": (200, "paused"),
        "continue": (200, "continued"),
        "reset": (200, "rank 1: perturbed"),
        "partly": (400, "expected a load of everything, as this rank is torn"),
        "mended": (200, "verified on 2 ranks"),
    }
    for what, (status, text) in expected.items():
        got, answer = found[what]
        assert got == status, (what, answer)
        assert answer["success"] == (status == 200), what
        assert text in answer["message"], (what, answer)
    before, after = found["checksum"][1], found["checksum after"][1]
    assert before == {
        "transformer": checksum("transformer", 2),
        "vae": checksum("vae", 1),
        "text_encoder": checksum("text_encoder", 1),
    }
    assert after == {"vae": checksum("vae", 2)}
    assert (found["version 1"], found["version 3"]) == ({"weight_version": "1"}, {"weight_version": "3"})
    assert (found["health"], found["torn"], found["no token"]) == (200, 503, 401)
    assert found["mended health"]["message"] == "replica 0: 2 of 2 ranks, ready"
    assert calls == ["flush", "flush", "flush", "pause retract", "resume", "flush"]
    ones = dict.fromkeys(SHAPES, 1)
    for seen, state, last in servers:
        assert seen == [
            (1, ones),
            (2, ones | {"transformer": 2}),
            (None, ones | {"transformer": 2, "vae": 2}),
            (None, dict.fromkeys(SHAPES, 2)),
            (3, {"transformer": 3, "vae": 3, "text_encoder": 2}),
            (3, dict.fromkeys(SHAPES, 3)),
        ]
        assert (state, last) == (("ready", 3), dict.fromkeys(SHAPES, 3))
