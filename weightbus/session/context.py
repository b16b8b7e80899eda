"""What a process's rounds share, handed down to whoever takes part in one."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from weightbus.control import messages as m
from weightbus.control.link import Link
from weightbus.errors import ProtocolError
from weightbus.hub.in_process import Loopback
from weightbus.memory.streams import Lanes
from weightbus.report import Process
from weightbus.routes.compiled import Planned
from weightbus.routes.group import Group
from weightbus.session.destination import Destination
from weightbus.session.hearing import Aside
from weightbus.session.origin import Origin
from weightbus.tensors.bucket import Staging


class Plans:
    """Compiled plans, by the hub's name for each. recent: the one that ran last, if it still holds."""

    def __init__(self) -> None:
        self._plans: dict[str, Planned] = {}
        self.recent: Planned | None = None

    @property
    def tokens(self) -> list[str]:
        """From the oldest to the newest."""
        return list(self._plans)

    def get(self, token: str) -> Planned | None:
        return self._plans.get(token)

    def keep(self, token: str, planned: Planned) -> None:
        self.forget(token)
        self._plans[token] = planned

    def forget(self, token: str) -> None:
        if (planned := self._plans.pop(token, None)) is not None:
            if planned is self.recent:
                self.recent = None
            planned.sharing.close()

    def clear(self) -> None:
        """Drop all, and the memory of other processes that is mapped for them."""
        for token in self.tokens:
            self.forget(token)


class Context:
    """Of one process: link, endpoints, staging, plans, and its place in the epoch with the epoch's group.

    origin, destination: what it sends as a trainer rank, writes as a server rank. epoch, members, place, token:
    as of the last offer.
    """

    def __init__(self, link: Link | Loopback, device: torch.device, num_buckets: int) -> None:
        self.link = link
        self.aside = Aside(link)
        self.origin: Origin | None = None
        self.destination: Destination | None = None
        self.plans = Plans()
        self.wire: dict[str, str] = {}  # dtypes in which tensors travelled last, the same on all ranks
        self.epoch = -1
        self.members: list[m.Member] = []
        self.place = 0
        self.token = ""
        self._group: Group | None = None
        self._processes: tuple[list[m.Member], tuple[Process, ...]] = self.members, ()
        self.use(device, num_buckets)

    def use(self, device: torch.device, num_buckets: int) -> None:
        """The device that does the work."""
        self.device = device
        self.staging = Staging(device, num_buckets)
        self.lanes = Lanes(device)

    @property
    def me(self) -> m.Member:
        """This rank, among the members of the last offer."""
        return self.members[self.place]

    def enter_epoch(self, offer: m.Offer) -> m.Offer:
        """A new epoch makes the group and the plans of older ones useless. The offer with its members."""
        epoch = offer.epoch
        if epoch < self.epoch:
            raise ProtocolError(f"epoch: expected {self.epoch} or newer, got {epoch}")
        own = m.member_id(self.link.peer)
        members = offer.members or self.members
        place = next((i for i, member in enumerate(members) if member.peer == own), None)
        if place is None:
            raise ProtocolError(f"offer: expected this rank among the {len(members)} members")
        if epoch > self.epoch:
            self.drop_group(abort=True)
            self.plans.clear()
            self.epoch = epoch
        self.members, self.place, self.token = members, place, offer.group
        return msgspec.structs.replace(offer, members=self.members)

    @property
    def has_group(self) -> bool:
        return self._group is not None

    def join_group(self, timeout_s: float, check: Callable[[], None]) -> Group:
        """The epoch's group; made by all members together, if it is not there. check: as of ``Group``."""
        if self._group is None:
            self._group = Group(
                self.link,
                epoch=self.epoch,
                rank=self.place,
                size=len(self.members),
                device=self.device,
                timeout_s=timeout_s,
                check=check,
            )
        return self._group

    def drop_group(self, *, abort: bool) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close(abort=abort)

    def processes(self) -> tuple[Process, ...]:
        """All members of the last update; made once for each epoch."""
        if self._processes[0] is not self.members:
            found = tuple(
                Process(
                    ranks=str(member),
                    host=member.host,
                    pid=member.pid,
                    started=member.started,
                    serves=member.trainer is None,
                )
                for member in self.members
            )
            self._processes = self.members, found
        return self._processes[1]
