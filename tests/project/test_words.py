"""docs/checks.md says what each word proves: the table has the code's words, and each can be had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import weightbus
from weightbus.control import messages as m

TEXT = (Path(__file__).parents[2] / "docs" / "checks.md").read_text()


def rows(*titles: str) -> list[list[str]]:
    head = "| " + " | ".join(titles) + " |\n"
    assert TEXT.count(head) == 1, head
    lines = TEXT[TEXT.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


WORDS = {word.strip("`"): (proves, not_) for word, proves, not_ in rows("word", "proves", "does not prove")}


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
        self.cache = None


def test_table_has_the_words_of_the_code():
    assert list(WORDS) == list(get_args(m.Word))


def test_table_has_the_kinds_of_the_code():
    kinds = [kind.strip("`") for kind, _ in rows("kind", "what was found equal")]
    assert sorted(kinds) == sorted(kind or "empty" for kind in get_args(m.Damage))


def verified(source, target):
    with weightbus.colocate(source, target) as pair:
        report, verdict = pair.update(1), pair.check()
    assert not report.partial
    assert torch.equal(target.weight, source.weight), WORDS["verified"][0]
    return {report.word, verdict.word}


def partial(source, target):
    target.cache = target.weight.detach().t().contiguous()
    with weightbus.colocate(source, target) as pair:
        report, verdict = pair.update(1), pair.check()
    assert list(report.partial) == list(verdict.partial) == ["cache"]
    assert torch.equal(target.weight, source.weight), WORDS["partial"][0]
    assert not torch.equal(target.cache, source.weight.t()), WORDS["partial"][1]
    return {report.word, verdict.word}


def unverified(source, target):
    with weightbus.colocate(source, target) as pair:
        return {pair.update(1, verify=False).word}


def mismatch(source, target):
    with weightbus.colocate(source, target) as pair:
        pair.update(1)
        with torch.no_grad():
            target.weight[1, 2] += 1
        verdict = pair.check()
    assert [one.tensor for one in verdict.mismatches] == ["weight"], WORDS["mismatch"][0]
    assert not verdict.ok
    return {verdict.word}


def failed(source, target):
    target.weight = nn.Parameter(torch.zeros(5))
    with weightbus.colocate(source, target) as pair, pytest.raises(weightbus.UpdateError, match="nothing was"):
        pair.update(1)
    return {"failed"}


@pytest.mark.parametrize("word", WORDS)
def test_each_word_can_be_had(word):
    assert globals()[word](Model(1), Model(2)) == {word}


def test_what_verified_does_not_prove():
    """Each part of the table's last column, so that it claims no less than is true."""
    source, target = Model(1), Model(2)
    copy = target.weight.detach().clone()
    target.cache = target.weight.detach().clone()
    target.closure = lambda x: x @ copy
    with weightbus.colocate(source, target, local=["cache"]) as pair:
        assert pair.update(1).word == "verified"
        with torch.no_grad():
            target.weight.zero_()
    assert all(text in WORDS["verified"][1] for text in ("`local=`", "no module holds", "changes after"))
    assert not torch.equal(target.cache, source.weight)
    assert not torch.equal(target.closure(torch.eye(4)), source.weight)


def test_how_many_names_travel():
    (number,) = re.findall(r"At most (\d+) names travel", TEXT)
    assert int(number) == m.MAX_PARTIAL
    assert f"`{m.MORE}`" in TEXT


def test_names_are_cut_once():
    many = {f"n{i}": "unknown" for i in range(1000)}
    once = m.cut(many)
    assert m.cut(once) == once
    assert once[m.MORE].startswith(f"{1000 - m.MAX_PARTIAL} ")
    assert m.cut({"a": "b"}) == {"a": "b"}
    assert m.cut({}) == {}
    both = m.cut({**once, **{f"o{i}": "unknown" for i in range(10)}})
    assert both[m.MORE].startswith(f"{1010 - m.MAX_PARTIAL} ")
    m_done = m.Done(peer="p", partial=m.cut({"x" * 5000: "y" * 5000}))
    assert len(next(iter(m_done.partial))) <= 1024
