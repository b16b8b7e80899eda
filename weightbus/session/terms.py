"""What a publisher's calls have in common, as its arguments say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from weightbus.control import messages as m
from weightbus.errors import SpecError, WeightbusError
from weightbus.session.origin import Origin
from weightbus.tensors.source_copy import NOT_CAST, Where

# A wave's bytes, on the CPU and on CUDA: enough that the link's pauses between waves do not count, little
# enough that the first wave's packing and the last one's installing do not either.
BUCKET_BYTES = 64 << 20, 256 << 20
DEFAULT_NUM_BUCKETS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """As of ``Publisher``. Raises SpecError for what can't be meant."""

    min_replicas: int | Literal["all"]
    retries: int
    bucket_bytes: int
    num_buckets: int
    route: m.Route
    copy_to: Where
    catch_up: bool
    join_s: float
    ready_s: float
    transfer_s: float

    def __post_init__(self) -> None:
        if self.min_replicas != "all" and self.min_replicas < 1:
            raise SpecError(f"min_replicas: expected at least 1, or 'all', got {self.min_replicas}")
        if self.retries < 0:
            raise SpecError(f"retries: expected at least 0, got {self.retries}")
        if self.route not in get_args(m.Route):
            raise SpecError(f"route: expected one of {', '.join(get_args(m.Route))}, got {self.route!r}")
        if self.copy_to not in ("device", "host"):
            raise SpecError(f"copy_to: expected 'device' or 'host', got {self.copy_to!r}")
        if self.bucket_bytes < 1 << 10 or self.num_buckets < 1:
            raise SpecError(
                "staging: expected at least 1 bucket of 1024 bytes, "
                f"got {self.num_buckets} of {self.bucket_bytes}"
            )

    def enter(
        self,
        origin: Origin,
        kind: m.Kind,
        version: int,
        modules: Sequence[str] | None,
        *,
        verify: bool,
        sent: m.Sent,
        dtypes: Mapping[str, str] = NOT_CAST,
    ) -> m.Enter:
        """A call of that kind. dtypes: as of ``Origin.facts``.

        One that this rank can't make bears a refusal: the other trainer ranks are calling too, and get this
        reason instead of a deadline.
        """
        facts = refusal = ""
        try:
            _, facts = origin.facts(modules, dtypes)
        except WeightbusError as error:
            refusal = str(error)
        jobs = origin.jobs() if kind == "check" else []
        if kind == "check" and not jobs:
            refusal = "check: expected a version committed by update(verify=True), got none"
        return m.Enter(
            peer="",
            kind=kind,
            version=version,
            modules=None if modules is None else list(modules),
            verify=verify,
            facts=facts,
            settings=m.Settings(bucket_bytes=self.bucket_bytes, route=self.route, source=sent),
            min_replicas=1 if self.min_replicas == "all" else self.min_replicas,
            all_replicas=self.min_replicas == "all",
            join_s=self.join_s,
            ready_s=self.ready_s,
            transfer_s=self.transfer_s,
            jobs=jobs,
            refusal=refusal,
            catch_up=self.catch_up,
        )
