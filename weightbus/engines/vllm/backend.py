"""The backend ``weightbus`` of vLLM's weight transfer: its worker's side and its trainer's side.

What vLLM calls, on which ranks, in which order: ``init_transfer_engine`` once for each trainer; then for each
version ``start_weight_update``, ``receive_weights``, ``finish_weight_update``; on all workers of an engine.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.distributed.weight_transfer import base

from weightbus.control.identity import address_of
from weightbus.engines.receiver import Receiver
from weightbus.engines.vllm.admission import admit, checkpoint_of
from weightbus.engines.vllm.apart import apart
from weightbus.engines.vllm.placement import place_of
from weightbus.engines.vllm.plugin import NAME
from weightbus.errors import SpecError, UpdateError, WeightbusError
from weightbus.publisher import Publisher
from weightbus.report import Report

log = logging.getLogger("weightbus")


@dataclass
class InitInfo(base.WeightTransferInitInfo):
    """How workers find the trainer.

    address, job, keys, insecure: the hub, as a Subscriber's. replica: the number of the engine's first
    replica; engines of one job need different ones. baseline: compare the live weights with the checkpoint
    that the engine was loaded from, before the first update; where its files can't be found this is left out,
    and logged. require_proof: as a Subscriber's; without it, updates may go unverified.
    connect_timeout_s: to find the hub.
    """

    address: str | None = None
    job: str | None = None
    replica: int = 0
    keys: str | None = None
    insecure: bool = False
    baseline: bool = True
    require_proof: bool = True
    connect_timeout_s: float = 120.0


@dataclass
class UpdateInfo(base.WeightTransferUpdateInfo):
    """What a worker takes part in. version: an update, by the trainer's number. check: a check, instead, which
    writes nothing. timeout_s: how long a worker waits for the trainer's offer of it."""

    version: int | None = None
    check: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if (self.version is None) != bool(self.check):
            raise SpecError(
                f"update_info: expected a version or check=True, got version={self.version}, check={self.check}"
            )


class WorkerEngine(base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's side: a Subscriber of the worker's model, written in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._admitted = admit(model, vllm_config)
        self._receiver: Receiver | None = None
        self._proved = False
        self._left_as = "empty"
        for note in self._admitted.notes:
            log.warning("weightbus: %s", note)

    @property
    def state(self) -> str:
        """``empty``, ``ready``, ``updating`` or ``torn``; of this worker's weights."""
        return self._receiver.state if self._receiver is not None else self._left_as

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's hub; again, for a trainer that was started anew. Raises SpecError, HubError."""
        self.shutdown()
        place = place_of(self.parallel_config, init_info.replica)
        self._receiver = Receiver(
            self.model,
            address=init_info.address,
            job=init_info.job,
            keys=init_info.keys,
            insecure=init_info.insecure,
            rank=place.rank,
            replica_size=place.size,
            replica=place.replica,
            local=self._admitted.local,
            derived=self._admitted.derived,
            torn=self._left_as == "torn",
            require_proof=init_info.require_proof,
            baseline=self._baseline(init_info),
            connect_timeout_s=init_info.connect_timeout_s,
        )
        self._proved = True

    def _baseline(self, init_info: InitInfo) -> str | None:
        """The checkpoint, as long as what is live must be equal to it."""
        if self._proved or not init_info.baseline:
            return None
        path = checkpoint_of(self.model_config, self.vllm_config.load_config)
        if path is None:
            log.warning("weightbus: no safetensors files of the model were found: no proof of the baseline")
        return None if path is None else str(path)

    def start_weight_update(self) -> None:
        self._joined().start()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the commit has waited for the device

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with apart(self.vllm_config):
            if update_info.version is None:
                self._joined().check(float(update_info.timeout_s))
            else:
                self._joined().receive(int(update_info.version), float(update_info.timeout_s))

    def finish_weight_update(self) -> None:
        self._joined().finish()

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._left_as = self._receiver.state
            self._receiver.close()
            self._receiver = None

    def _joined(self) -> Receiver:
        if self._receiver is None:
            raise UpdateError("expected init_weight_transfer_engine before an update, got none")
        return self._receiver


@dataclass
class TrainerInit(base.TrainerInitInfo):
    """A trainer rank's part. rank: this rank's; size: of how many. address, job, keys, insecure: the hub, as a
    Publisher's; replica, baseline: as ``InitInfo``'s. options: further arguments of the Publisher."""

    backend: ClassVar[str] = NAME

    size: int = 1
    address: str | None = None
    job: str | None = None
    keys: str | None = None
    insecure: bool = False
    replica: int = 0
    baseline: bool = True
    options: dict[str, Any] | None = None


class TrainerEngine(base.TrainerWeightTransferEngine[TrainerInit]):
    """The trainer's side: a Publisher on each rank; rank 0 makes vLLM's calls beside it.

    source: vLLM's ``ModuleSource``, or what a Publisher takes. Shards are sent as they lie, not gathered.
    """

    init_info_cls = TrainerInit

    def __init__(self, *, client: Any, source: Any, is_sender: bool, publisher: Publisher) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self.publisher = publisher

    @classmethod
    def trainer_init(cls, init_info: TrainerInit, *, client: Any, source: Any = None) -> TrainerEngine:
        """Collective over trainer ranks. Raises SpecError for a source whose tensors it can't find in place."""
        hub: dict[str, Any] = {
            "address": address_of(init_info.address),
            "job": init_info.job,
            "keys": init_info.keys,
            "insecure": init_info.insecure,
        }
        publisher = Publisher(
            _tensors_of(source), rank=init_info.rank, size=init_info.size, **hub, **(init_info.options or {})
        )
        if init_info.is_sender:
            try:
                client.init_weight_transfer_engine(
                    {**hub, "replica": init_info.replica, "baseline": init_info.baseline}
                )
            except BaseException:
                publisher.close()
                raise
        return cls(client=client, source=source, is_sender=init_info.is_sender, publisher=publisher)

    def send_weights(self, version: int | None = None) -> Report:
        """Publish the source as ``version``, by default the next one; collective over trainer ranks.

        Raises UpdateError if nothing was written, TornError if workers hold a mixture.
        """
        version = (self.publisher.version or 0) + 1 if version is None else version
        if not self.is_sender:
            return self.publisher.update(version)
        self.client.start_weight_update()
        with _Beside(lambda: self.client.update_weights({"version": version})) as call:
            report = self.publisher.update(version)
        if call.error is not None:
            raise call.error
        self.client.finish_weight_update(str(version))
        return report

    def shutdown(self) -> None:
        self.publisher.close()


def _tensors_of(source: Any) -> Any:
    """What a Publisher takes of a source. Raises SpecError for a WeightSource that computes what it gives."""
    if isinstance(source, base.ModuleSource):
        return source._module
    if source is None or isinstance(source, base.WeightSource):
        raise SpecError(
            f"source: expected a ModuleSource, a module or (name, tensor) pairs, whose shards are sent as they "
            f"lie, got {type(source).__name__}"
        )
    return source


class _Beside:
    """A call in another thread for as long as the block runs; waited for at its end."""

    def __init__(self, call: Any) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name="weightbus-vllm", daemon=True)

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> _Beside:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._thread.join()
        if isinstance(error, WeightbusError) and self.error is not None:
            log.error("vLLM: %s", self.error)
