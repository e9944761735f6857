"""`benchmarks.run decode` without a GPU: options, the formula, models that share weights, tables. Times need a GPU."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import decode, decode_report, run
from flexrattn.decode import DecodeCache, decode_step
from flexrattn.decode.fast import joined_weights
from tests.closeness import relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--points 64", "a point must be BATCHxCONTEXT, such as 64x8192, got '64'"),
        ("--points 0x4096", "a batch must be 1 or more, got 0"),
        ("--points 1x20", "a context must be 33 to 131072, got 20"),
        ("--largest 999999", "got 999999"),
        ("--batches 1", "--batches and --contexts go together"),
        ("--batches 1 --contexts 512 --points 1x512", "not both"),
        ("--layers 3", "--layers must be 4 or more"),
        ("--fold-every 3", "--fold-every must divide 16, got 3"),
        ("--only mamba", "--only must be among RAttention-512, SWA-4096"),
        ("--flavor 3c", "did you mean"),
        ("--repeats 1", "--repeats must be 3 or more"),
        ("--plot a.jpg", "must end in .png"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    assert run.main(["decode", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_points():
    options = run.make_parser().parse_args(["decode", "--batches", "4", "1", "--contexts", "512", "64"])
    assert decode.points_of(options) == [(1, 64), (4, 64), (1, 512), (4, 512)]
    assert [arm.name for arm in decode.chosen_arms(options)] == [
        "RAttention-512",
        "SWA-4096",
        "full, ours",
        "full, library",
    ]


@pytest.mark.parametrize("arm", decode.arms(512, 4096), ids=lambda arm: arm.name)
def test_the_formulas_cache_is_the_caches(arm):
    for context in (1024, 32768):
        config = decode.make_config(arm, "3b", max_length=context)
        cache = DecodeCache(config, rows=3, max_length=context, device="meta", dtype=torch.bfloat16)
        assert decode.formula_cache_bytes(config, context, 2) == cache.bytes_per_sequence


def test_the_formula():
    """The paper's promise for RAttention-512 on an H200: 2.5 and 1.6 times full and SWA-4096 at batch 64 and 8192."""
    seconds = {}
    for arm in decode.arms(512, 4096)[:3]:
        config = decode.make_config(arm, "3b", max_length=8192)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in config.build().parameters())
        assert 2.9e9 < parameters < 3.1e9
        seconds[arm.name] = decode.formula_seconds(
            B=64,
            cache=decode.formula_cache_bytes(config, 8192, 2),
            parameters=parameters,
            itemsize=2,
            bandwidth=4.3e12,
            flops=7.9e14,
        )
    own = seconds["RAttention-512"]
    assert seconds["full, ours"] / own == pytest.approx(2.5, abs=0.15)
    assert seconds["SWA-4096"] / own == pytest.approx(1.6, abs=0.15)


def test_models_that_share_weights():
    """Joined once, read by all; a model of its own weights computes the same."""
    models = []
    for i, arm in enumerate((*decode.arms(7, 9)[:2], decode.arms(7, 9)[0])):
        config = decode.make_config(arm, "debug", max_length=64)
        models.append(decode.random_model(config, CPU, torch.float32, seed=0, like=models[0] if i else None))
        if not i:
            for block in models[0].layers.values():
                joined_weights(block)
    first, swa, again = models
    assert swa.lm_head.weight is swa.tok_embeddings.weight is first.lm_head.weight
    assert swa.layers["2"].feed_forward.w1.weight is first.layers["2"].feed_forward.w1.weight
    assert joined_weights(swa.layers["0"])[0] is joined_weights(first.layers["0"])[0]
    assert not any(p.is_meta for model in models for p in (*model.parameters(), *model.buffers()))
    logits = []
    for model in (first, again):
        cache = DecodeCache(model.config, rows=2, max_length=64, device="cpu", dtype=torch.float32)
        decode.fill(cache, 40, seed=1)
        logits.append(decode_step(model, cache, torch.tensor([3, 5])))
    assert relative_error(logits[0], logits[1]) == 0
    assert logits[0].isfinite().all()


def test_rows_are_written(tmp_path):
    def row(name: str, rate: float | None, **options) -> decode_report.Row:
        return decode_report.Row(
            contender=name, B=2, context=64, tokens_per_s=rate, formula_ms=1.0, dtype="bf16", **options
        )

    rows = [row("RAttention-512", 300.0), row("full, ours", 100.0), row("full, library", 150.0, kernel="FA2")]
    rows.append(row("SWA-4096", None, note="FAILED: broken"))
    decode_report.set_ratios(rows)
    assert [each.x_full for each in rows] == [2.0, 100 / 150, 1.0, None]
    assert decode_report.failed(rows)
    assert not decode_report.failed(rows[:3])
    text = decode_report.table(rows)
    assert "FA2" in text
    assert "FAILED: broken" in text
    decode_report.write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [each["x_full"] for each in read] == ["2", "0.666667", "1", ""]
    decode_report.write_plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1000
