"""What torchtitan does with our loader and tokenizer, and its own dataset beside them."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.tools import utils

from flexrattn.data.text import TextDataLoader
from flexrattn.data.tokenizer import ByteTokenizer

T, B = 16, 4


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i} says {i * i}\n" * (1 + i % 5))
    return tmp_path


def validation_losses(folder, monkeypatch, *, steps):
    """(sum of losses / counted tokens) of two passes of torchtitan's Validator over a fixed bigram model."""
    monkeypatch.setattr(utils, "device_type", "cpu")
    config = Validator.Config(
        enable=True,
        steps=steps,
        dataloader=TextDataLoader.Config(
            dataset="local", dataset_path=str(folder), split="validation", validation_fraction=0.3, shard_by="rows"
        ),
    )
    dims = SimpleNamespace(pp_enabled=False, dp_enabled=False, cp_enabled=False, dp_cp_enabled=False)
    losses = []
    metrics = SimpleNamespace(ntokens_since_last_log=0, log_validation=lambda *, loss, step: losses.append(loss))

    class Bigram(nn.Embedding):
        def forward(self, x, positions):
            return super().forward(x)

    torch.manual_seed(0)
    model = Bigram(259, 259)
    validator = config.build(
        parallelism=ParallelismConfig(),
        dp_world_size=1,
        dp_rank=0,
        tokenizer=ByteTokenizer(),
        parallel_dims=dims,
        loss_fn=lambda p, y: (nn.functional.cross_entropy(p.flatten(0, 1), y.flatten(), reduction="sum"), None),
        validation_context=torch.no_grad,
        metrics_processor=metrics,
        seq_len=T,
        local_batch_size=B,
    )
    validator.validate([model], step=1)
    validator.validate([model], step=2)
    return losses


@pytest.mark.parametrize("steps", [-1, 3])
def test_the_validator_sees_the_same_rows_each_time(folder, monkeypatch, steps):
    first, second = validation_losses(folder, monkeypatch, steps=steps)
    assert first == second
    assert 4 < first < 8


def test_torchtitans_own_datasets_work_beside(monkeypatch):
    data = Dataset.from_list([{"text": f"a document of number {i}"} for i in range(20)])
    monkeypatch.setitem(DATASETS, "tiny", DatasetConfig("", lambda path: data, lambda sample: sample["text"]))
    stock = HuggingFaceTextDataLoader.Config(dataset="tiny").build(
        dp_world_size=1,
        dp_rank=0,
        tokenizer=ByteTokenizer.Config().build(tokenizer_path="unused"),
        seq_len=T,
        local_batch_size=B,
    )
    x, y = next(iter(stock))
    assert x["input"].shape == x["positions"].shape == y.shape == (B, T)
    assert x["input"][0, 0] == ByteTokenizer.bos_id
