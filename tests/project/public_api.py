"""How users call weightbus, for type checkers: mypy strict has nothing to say about it. It is never run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import nn

import weightbus


def trainer(model: nn.Module, steps: int) -> None:
    with weightbus.Publisher(model, min_replicas=2, exclude=["v_head.*"], route="peer") as publisher:
        for step in range(1, steps + 1):
            report: weightbus.Report = publisher.update(step)
            words: list[str] = [report.word, report.route, *report.partial]
            print(words, report.seconds, report.nbytes)
        later: Future[weightbus.Report] = publisher.update(steps + 1, wait=False)
        print(later.result().version)
        following: weightbus.Report = publisher.update()
        print(following.version, publisher.version)
        cancelled: bool = publisher.cancel("a bad step")
        print(cancelled)
        verdict: weightbus.Verdict = publisher.check()
        print([(mismatch.tensor, mismatch.rank, mismatch.kind) for mismatch in verdict.mismatches])


def mapping(models: dict[str, nn.Module], pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
    weightbus.Publisher(models).update(1, modules=["vae"], verify=False)
    weightbus.Publisher(list(pairs), rename={"a": "b"}).close()


def server(model: nn.Module) -> str:
    def derived(held: dict[str, torch.Tensor]) -> torch.Tensor:
        return held["weight"] + 1

    subscriber = weightbus.Subscriber(
        model,
        replica=0,
        name_map=lambda name: name.removeprefix("model."),
        local=["*.inv_freq"],
        on_update=lambda version: print(version),
        on_torn=lambda error: print(error),
    )
    try:
        subscriber.poll(0.1)
        version: int = subscriber.wait(7, timeout_s=60.0)
        print(version)
        subscriber.serve()
        return subscriber.state
    except weightbus.TornError as error:
        return str(error)
    finally:
        subscriber.close()


def colocated(source: nn.Module, target: nn.Module) -> int:
    with weightbus.colocate(source, target) as pair:
        pending: weightbus.Pending = pair.update(2, wait=False)
        polled: weightbus.Report | None = pair.poll()
        print(pending.done, pending.result().word, polled)
        return pair.update(1).nbytes


def operator(address: str) -> None:
    with weightbus.Client(address) as client:
        print([peer.host for peer in client.status().peers], client.check().ok, client.pause(1.0).reason)


def proof(model: nn.Module) -> None:
    before: weightbus.Snapshot = weightbus.snapshot(model)
    weightbus.perturb(model, seed=1)
    print(before.compare(model), weightbus.model_digest(model), weightbus.module_sha256(model))
