"""Whether two models can be one: each rank describes its own with the hello, and unnamed jobs compare them.

A job that has a name is what its name says, and is not looked into. Nothing here proves that an update will do:
that is found out when facts are exchanged, tensor by tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from weightbus.control import messages as m
from weightbus.planning.spec import ITEMSIZE, Spec, castable, fingerprint

# With so many tensors expected in both samples, to find none there is no accident.
SURE = 16

# Names of so many characters together are told at most: a hello is one frame.
MAX_NAME_CHARACTERS = 32 << 10


def sketch_of(specs: Mapping[str, Spec], *, plain: Iterable[str], whole: bool) -> m.Sketch:
    """plain: names that mean the same on both ends and are written as they come. whole: all names are."""
    names = sorted(plain, key=_order)
    sample, characters = [], 0
    for name in names[: m.MAX_SAMPLE]:
        characters += len(name)
        if characters > MAX_NAME_CHARACTERS:
            break
        sample.append(m.Sampled(name=name[:1024], dtype=specs[name].dtype, shape=list(specs[name].shape)))
    return m.Sketch(
        fingerprint=fingerprint([(s.name, s.dtype, s.shape) for _, s in sorted(specs.items())]),
        tensors=len(specs),
        plain=len(names),
        whole=whole,
        sample=sample,
    )


def _order(name: str) -> tuple[bytes, str]:
    """By the end of the name, so that samples meet where one end has a prefix that the other has not."""
    tail = ".".join(name.split(".")[-3:])
    return hashlib.sha256(tail.encode()).digest()[:8], name


def unlike(trainers: Sequence[m.Sketch], server: m.Sketch, *, complete: bool) -> str:
    """Why a server's model can't be that of the trainer ranks; empty if it can, or nothing is known.

    complete: all trainer ranks are among them; each may hold a part.
    """
    sent = {one.name: one for trainer in trainers for one in trainer.sample}
    held = {one.name: one for one in server.sample}
    common = sorted(sent.keys() & held.keys())
    other = [name for name in common if not _fits(sent[name], held[name])]
    if other and 2 * len(other) >= len(common):
        name = other[0]
        return (
            f"{name}: expected {_text(sent[name])} as on the trainer, got {_text(held[name])} on the server;"
            f" so are {len(other)} of {len(common)} names that were compared"
        )
    if common or not (sent and held and complete and server.whole):
        return ""
    overlap = min(_overlap(trainer, server) for trainer in trainers)
    if overlap < SURE or any(_prefixed(a, b) for a in sent for b in held):
        return ""
    return f"no name in common: {_names(sent)} on the trainer, {_names(held)} on the server"


def _fits(sent: m.Sampled, held: m.Sampled) -> bool:
    known = sent.dtype in ITEMSIZE and held.dtype in ITEMSIZE
    return sent.shape == held.shape and (not known or castable(sent.dtype, held.dtype))


def _overlap(trainer: m.Sketch, server: m.Sketch) -> float:
    """How many tensors are expected in both samples, if one model's names were among the other's."""
    if trainer.plain == len(trainer.sample) and server.plain == len(server.sample):
        return float("inf")  # nothing was left out
    most = max(trainer.plain, server.plain, 1)
    return min(len(trainer.sample), len(server.sample)) * min(trainer.plain, server.plain) / most


def _prefixed(one: str, other: str) -> bool:
    """Equal but for a prefix: the same model, named otherwise, of which the update's refusal says more."""
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _text(one: m.Sampled) -> str:
    return f"{one.dtype}{one.shape}"


def _names(sample: Mapping[str, m.Sampled]) -> str:
    some = sorted(sample)[:3]
    return ", ".join(some) + (", ..." if len(sample) > len(some) else "")
