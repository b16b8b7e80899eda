"""What a server rank's state is after updates of all its modules, and of some."""

from __future__ import annotations

import torch
from torch import nn

from weightbus.control import messages as m
from weightbus.planning.spec import Spec
from weightbus.session.destination import Destination


def outcome(ok: bool) -> m.Outcome:
    failures = [] if ok else [m.Failure(rank="trainer rank 0", tensor=None, reason="died")]
    return m.Outcome(update=1, ok=ok, moved=True, verdict="verified" if ok else "failed", failures=failures)


def destination(source, **callbacks):
    given = {
        "device": None,
        "on_update": None,
        "on_commit": None,
        "on_torn": None,
        "on_refused": None,
    } | callbacks
    return Destination(source, name_map=None, local=(), derived=(), trust_traces=False, cpu_group=None, **given)


def test_a_target_is_made_again_only_where_something_has_changed():
    module = nn.Linear(3, 2)
    end = destination(module)
    manifest = {
        name: Spec(name=name, dtype="float32", shape=tuple(tensor.shape))
        for name, tensor in module.named_parameters()
    }
    target = end.target(manifest, None)
    assert end.target(dict(manifest), None) is target
    assert end.target(manifest, None, partial=True) is not target
    target = end.target(manifest, None)
    other = {name: Spec(name=name, dtype="float64", shape=spec.shape) for name, spec in manifest.items()}
    assert end.target(other, None) is not target
    target = end.target(manifest, None)
    module.weight.data = torch.zeros(2, 3)
    assert end.refresh()
    moved = end.target(manifest, None)
    assert moved is not target
    ((_, view),) = moved.live("weight")
    assert view.data_ptr() == module.weight.data_ptr()


def test_only_updates_of_all_torn_modules_lead_out_of_torn():
    heard = []
    end = destination(
        {"transformer": nn.Linear(2, 2), "vae": nn.Linear(2, 2), "encoder": nn.Linear(2, 2)},
        on_commit=lambda version: heard.append(("commit", version)),
        on_torn=lambda error: heard.append(("torn", str(error))),
        on_refused=lambda error: heard.append(("refused", str(error))),
    )

    def update(version, ok, modules, wrote=True):
        end.before(version)
        end.after(outcome(ok), version, modules, wrote)
        return end.state

    assert update(1, True, None) == "ready"
    assert update(2, False, ["transformer", "vae"]) == "torn"
    assert update(3, True, ["encoder"]) == "torn"
    assert update(4, True, ["vae"]) == "torn"
    assert heard[-1] == ("torn", "version 4 is in place, but transformer still holds a mixture")
    assert update(5, False, ["vae"], wrote=False) == "torn"
    assert heard[-1][0] == "refused"
    assert update(6, True, ["transformer"]) == "ready"
    assert heard[-1] == ("commit", 6)
    assert update(7, False, None) == "torn"
    assert update(8, True, ["transformer", "vae"]) == "torn"
    assert update(9, True, None) == "ready"
    assert [word for word, _ in heard].count("commit") == 3
