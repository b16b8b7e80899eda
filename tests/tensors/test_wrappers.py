"""Wrapped models: the model's own names on both ends, and what it does not compute with is not sent.

Classes of the same names and attributes stand in for PEFT's, DeepSpeed's and Lightning's; tests/zoo has PEFT.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from processes import Job, run_jobs
from seeded import seeded
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

import weightbus
from weightbus.errors import SpecError
from weightbus.tensors.layout import layout_of
from weightbus.tensors.torch_wrappers import RULES

# torch.nn.utils.weight_norm and torch.jit are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*`torch.jit")


def class_of(library, kind, base=nn.Module, **body):
    """A class that another library might have."""
    return type(kind, (base,), {"__module__": f"{library}.somewhere", **body})


class TunerLayer(nn.Module):
    """As PEFT's layers are: ``base_layer``, and by adapter what is added to it until it is merged."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.active_adapters, self.disable_adapters, self.merged = ["default"], False, False
        self.add("default")

    def add(self, adapter):
        self.lora_A[adapter], self.lora_B[adapter] = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)


class TrainedCopy(nn.Module):
    """As PEFT's ``modules_to_save``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 4)})
        self.active_adapters, self.disable_adapters = ["default"], False


LoraLinear = class_of("peft", "Linear", class_of("peft", "BaseTunerLayer", TunerLayer))
ModulesToSave = class_of("peft", "ModulesToSaveWrapper", TrainedCopy)


def merged(module):
    layer = LoraLinear(module)
    layer.merged = True
    return layer


def saved(module):
    """The copy is what counts, so that the module is put in its place."""
    wrapper = ModulesToSave(nn.Linear(4, 4))
    wrapper.modules_to_save["default"] = module
    return wrapper


def holding(library, kind, key):
    """A wrapper of such a class, or of one that inherits from it."""

    def wrap(module):
        one = class_of(library, "Derived", class_of(library, kind))()
        setattr(one, key, module)
        return one

    return wrap


def fabric(module):
    one = class_of("lightning", "_FabricModule")()
    one._original_module, one._forward_module = module, nn.DataParallel(module)
    return one


def tuned(module):
    """As PEFT's models of models, which may hold tensors for all layers."""
    one = class_of("peft", "PeftModelForCausalLM", class_of("peft", "PeftModel"))()
    one.base_model = class_of("peft", "VeraModel", class_of("peft", "BaseTuner"))()
    one.base_model.model, one.base_model.vera_A = module, nn.Linear(2, 2)
    return one


def averaged(module):
    one = torch.optim.swa_utils.AveragedModel(nn.Identity())
    one.module = module  # itself, not a copy
    return one


WRAPS = {
    "compile": holding("torch", "OptimizedModule", "_orig_mod"),
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "DataParallel": nn.DataParallel,
    "averaged": averaged,
    "DDP": holding("torch", "DistributedDataParallel", "module"),
    "ZeRO": holding("deepspeed", "DeepSpeedEngine", "module"),
    "Fabric": fabric,
    "peft": tuned,
    "merged": merged,
    "modules_to_save": saved,
}


def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def plainly(module):
    """The tensors of a model that nothing wraps."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def wrapping(drawn):
    """Which wrappers, inner first, stand around the model and around modules of it."""
    return {place: drawn.sample(sorted(WRAPS), drawn.randrange(4)) for place in ("", "0", "1", "1.0")}


def wrapped(module, wrapping):
    def around(one, place):
        for name in wrapping[place]:
            one = WRAPS[name](one)
        return one

    module[1][0] = around(module[1][0], "1.0")
    for place in ("0", "1"):
        module[int(place)] = around(module[int(place)], place)
    return around(module, "")


@pytest.mark.parametrize("seed", range(40))
def test_names_are_those_of_the_model_however_it_is_wrapped(seed):
    """On either end, by any wrappers around any modules; and every tensor of the server is accounted for."""
    drawn = seeded(seed)
    source, target = wrapping(drawn), wrapping(drawn)
    plain, server = model(1), model(2)
    expected, held = plainly(plain), plainly(server)
    one, other = wrapped(plain, source), wrapped(server, target)
    assert set(layout_of(one).specs) == expected.keys()
    with weightbus.colocate(one, other) as pair:
        report = pair.update(1)
        assert pair.check().word == report.word
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    adapted = {"peft", "merged", "modules_to_save"} & {name for names in target.values() for name in names}
    unknown = {name for name in report.partial if not name.endswith("n_averaged")}
    assert bool(unknown) == bool(adapted), report
    assert not report.partial.keys() & expected.keys()
    sent = {id(tensor) for tensor in expected.values()}
    left = [t for t in (*one.parameters(), *one.buffers()) if id(t) not in sent]
    assert len(report.skipped) == len({id(t) for t in left})
    assert all("beside" in why for why in report.skipped.values())


def test_a_mapping_and_a_selection_of_it():
    source = {"a": merged(nn.Linear(4, 4)), "b": merged(nn.Linear(4, 4))}
    target = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    with weightbus.colocate(source, target, exclude=["*.lora_B.*"]) as pair:
        assert sorted(pair.update(1).skipped) == ["a.lora_A.default.weight", "b.lora_A.default.weight"]
        assert list(pair.update(2, modules=["b"]).skipped) == ["b.lora_A.default.weight"]


# -- what the model computes with ------------------------------------------------------------------


def state(layer, text):
    """Sets a layer as PEFT does: ``merged``, ``disabled``, ``inactive``, or several."""
    layer.merged, layer.disable_adapters = "merged" in text, "disabled" in text
    layer.active_adapters = ["other"] if "inactive" in text else ["default"]


@pytest.mark.parametrize("end", ["source", "target"])
@pytest.mark.parametrize(
    ("now", "why"),
    [
        (
            "",
            "0: expected the weights that the model computes with, got only those that a Linear of peft ",
        ),
        (
            "",
            "the adapter 'default' is not merged; merge_adapter() before the update",
        ),
        ("merged", ""),
        ("disabled", ""),
        ("inactive", ""),
        ("merged inactive", ""),
        ("merged disabled", "the next forward takes out an adapter that is merged and disabled"),
    ],
)
def test_an_adapter_is_merged_or_does_not_count(end, now, why):
    """At each update anew; a layer's state is no tensor that could be seen to move."""
    layer = LoraLinear(nn.Linear(4, 4))
    plain, with_adapter = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(layer)
    ends = (with_adapter, plain) if end == "source" else (plain, with_adapter)
    with weightbus.colocate(*ends, local=["*lora_*"]) as pair:  # made in any state
        state(layer, "merged")
        assert pair.update(1).word == "verified"
        state(layer, now)
        plain[0].weight.data.fill_(2.0)
        before = layer.base_layer.weight.clone(), plain[0].weight.clone()
        if why:
            with pytest.raises(weightbus.UpdateError, match=re.escape(why)):
                pair.update(2)
            assert torch.equal(layer.base_layer.weight, before[0])
            assert torch.equal(plain[0].weight, before[1])
            state(layer, "merged")
        assert pair.update(3).word == "verified"
        assert torch.equal(layer.base_layer.weight, plain[0].weight)


def test_a_save_is_refused_too(address, tmp_path):
    layer = LoraLinear(nn.Linear(4, 4))
    with weightbus.Publisher(layer, address=address, rank=0, size=1) as publisher:
        with pytest.raises(SpecError, match="the adapter 'default' is not merged"):
            publisher.save(tmp_path / "saved")
        state(layer, "merged")
        assert publisher.save(tmp_path / "saved").tensors == 2


def test_what_a_refusal_has_seen_moved_is_not_forgotten():
    """Merging gives a layer other storage; the plan over the former one must not run again."""
    layer, target = LoraLinear(nn.Linear(4, 4)), nn.Linear(4, 4)
    with weightbus.colocate(layer, target) as pair:
        state(layer, "merged")
        pair.update(1)
        layer.base_layer.weight.data = layer.base_layer.weight.data + 1  # unmerged
        state(layer, "")
        with pytest.raises(weightbus.UpdateError, match="not merged"):
            pair.update(2)
        state(layer, "disabled")
        assert pair.update(3).word == "verified"
    assert torch.equal(target.weight, layer.base_layer.weight)


@pytest.mark.parametrize("how", ["disabled", "another adapter", "no adapter", "an unknown adapter"])
def test_the_copy_that_is_trained_is_the_one_that_is_sent(how):
    wrapper, target = ModulesToSave(nn.Linear(4, 4)), nn.Linear(4, 4)
    copies = wrapper.modules_to_save
    copies["other"] = nn.Linear(4, 4)
    with weightbus.colocate(wrapper, target) as pair:
        report = pair.update(1)
        assert torch.equal(target.weight, copies["default"].weight)
        assert "original_module.weight" in report.skipped
        wrapper.disable_adapters = how == "disabled"
        names = {"another adapter": ["other"], "no adapter": [], "an unknown adapter": ["third"]}
        wrapper.active_adapters = names.get(how, ["default"])
        report = pair.update(2)
    used = copies["other"] if how == "another adapter" else wrapper.original_module
    assert torch.equal(target.weight, used.weight)
    assert "modules_to_save.default.weight" in report.skipped


def test_tensors_beside_a_servers_model_are_unknown_unless_declared():
    with weightbus.colocate(nn.Linear(4, 4), merged(nn.Linear(4, 4))) as pair:
        report = pair.update(1)
    assert report.word == "partial"
    assert set(report.partial) == {"lora_A.default.weight", "lora_B.default.weight"}


def test_prompts_and_unknown_kinds_of_adapters():
    prompted = class_of("peft", "PeftModelForCausalLM", class_of("peft", "PeftModel"))()
    prompted.base_model, prompted.prompt_encoder = nn.Linear(4, 4), nn.ModuleDict({"default": nn.Linear(4, 4)})
    with weightbus.colocate(prompted, nn.Linear(4, 4)) as pair:
        with pytest.raises(
            weightbus.UpdateError, match=r"a learnt prompt is no weight of the model; use get_base_"
        ):
            pair.update(1)
        prompted._adapters_disabled = True
        assert pair.update(2).word == "verified"
    unknown = nn.Sequential(class_of("peft", "XLoraModel", class_of("peft", "BaseTuner"))())
    for inner in (unknown, nn.Sequential(class_of("peft", "AdaptedAttention")())):
        with pytest.raises(
            SpecError, match=r"0: expected a module with tensors of its own, got a \w+ of peft: use"
        ):
            layout_of(inner)


# -- tensors that are not what they seem -----------------------------------------------------------


def test_a_partitioned_parameter_is_refused_by_name():
    """As ZeRO-3 has them: empty, until they are gathered, for as long as they are."""
    source, target = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    whole = source[0].weight.data
    source[0].weight.ds_shape = whole.shape

    def partition():
        source[0].weight.data = torch.empty(0)

    why = r"0\.weight: expected the whole tensor of \[4, 4\], got \[0\]: ZeRO-3 has partitioned it; .*Gathered"
    with weightbus.colocate(source, target) as pair:
        assert pair.update(1).word == "verified"
        partition()
        with pytest.raises(weightbus.UpdateError, match=why):
            pair.update(2)
        source[0].weight.data = whole + 1
        assert pair.update(3).word == "verified"
    assert torch.equal(target[0].weight, whole + 1)
    partition()
    for end in ((source, target), (target, source), (list(source.named_parameters()), target)):
        with pytest.raises(SpecError, match=why):
            weightbus.colocate(*end)


@pytest.mark.parametrize("attribute", ["quant_state", "SCB"])
def test_codes_of_quantised_weights_are_refused_by_name(attribute):
    quantised = nn.Sequential(nn.Linear(4, 4))
    setattr(quantised[0].weight, attribute, None)
    layout_of(quantised)  # not yet
    setattr(quantised[0].weight, attribute, object())
    with pytest.raises(SpecError, match=r"0\.weight: expected a tensor of values, got codes of them in a P"):
        layout_of(quantised)


def pruned(module):
    return prune.l1_unstructured(module, "weight", 3)


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.orthogonal, torch.nn.utils.weight_norm, pruned]
)
def test_a_weight_that_is_computed_by_one_end_only(norm):
    """The effective weight is another tensor: never sent for the original, nor written as one."""
    both = nn.Sequential(norm(nn.Linear(4, 4))), nn.Sequential(norm(nn.Linear(4, 4)))
    with weightbus.colocate(*both) as pair:
        assert pair.update(1).word in ("verified", "partial")
    inputs = torch.randn(3, 4)
    assert torch.equal(both[0](inputs), both[1](inputs))
    plain = nn.Sequential(nn.Linear(4, 4))
    for source, target in ((both[0], plain), (plain, both[0])):
        with (
            weightbus.colocate(source, target) as pair,
            pytest.raises(
                weightbus.UpdateError, match=r"one end computes 0\.weight from 0\..*weight_norm\(\) where"
            ),
        ):
            pair.update(1)


def test_an_original_can_not_be_renamed_to_a_weight():
    original, plain = (
        nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))),
        nn.Sequential(nn.Linear(4, 4)),
    )
    name = "0.parametrizations.weight.original"
    why = "expected both ends to compute a weight from it by a parametrization, or neither"
    with pytest.raises(SpecError, match=f"{name}: {why}"):
        weightbus.colocate(original, plain, rename={name: "0.weight"})
    with (
        weightbus.colocate(plain, original, name_map={"0.weight": name}) as pair,
        pytest.raises(weightbus.UpdateError, match=f"0.weight: {why}"),
    ):
        pair.update(1)
    other = nn.Sequential(nn.Identity(), parametrizations.orthogonal(nn.Linear(4, 4)))
    moved = {n: n.replace("0.", "1.", 1) for n in (name, "0.parametrizations.weight.0.base", "0.bias")}
    with weightbus.colocate(original, other, name_map=moved) as pair:
        assert pair.update(1).word == "verified"
    assert parametrize.is_parametrized(other[1])


# -- sharded and compiled, block by block ----------------------------------------------------------


def blocks():
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2)))


def _sharded(rank, size, *, address):
    torch.distributed.init_process_group("gloo")
    source = blocks()
    for index, block in enumerate(source):
        source[index] = torch.compile(block, backend="eager")
        torch.distributed.fsdp.fully_shard(source[index])
    torch.distributed.fsdp.fully_shard(source)
    with weightbus.Publisher(source, address=address, join_timeout_s=60) as publisher:
        word = publisher.update(1).word
    weight = source[1]._orig_mod[0].weight.full_tensor()
    torch.distributed.destroy_process_group()
    return word, weight.tolist()


def _compiled(rank, size, *, address):
    target = blocks()
    target[0] = torch.compile(target[0], backend="eager")
    with weightbus.Subscriber(torch.compile(target, backend="eager"), address=address) as subscriber:
        subscriber.serve()
    return target[1][0].weight.tolist()


def test_fsdp2_with_each_block_compiled(address):
    arguments = {"address": address}
    trainers, (served,) = run_jobs(
        Job(run=_sharded, size=2, arguments=arguments), Job(run=_compiled, arguments=arguments)
    )
    assert trainers == [("verified", served)] * 2


# -- what the documentation says -------------------------------------------------------------------


def test_the_table_of_the_documentation_is_the_codes():
    text = (Path(__file__).parents[2] / "docs" / "wrappers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` of `(\w+)` \|", text, re.MULTILINE)
    assert rows == [(rule.kind, rule.library) for rule in RULES if rule.kind != "*"]
