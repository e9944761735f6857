"""Runs of train.py: nothing is lost, ranks agree, checkpointing and compilation change no number they should not."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.flexrattn.runs import losses, script, train, write_config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[int, float]]:
    """Twelve steps in one go, with a checkpoint every four."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(folder, training={"steps": 12})
    done = train(config)
    assert "Training starts at step 1" in done.output
    return config, losses(folder / "out")


def copy_run(config: Path, to: Path) -> Path:
    """The same configuration and corpus with an output folder of its own."""
    copied = to / config.name
    text = config.read_text().replace(f"dump_folder: {config.parent}/out", f"dump_folder: {to}/out")
    copied.write_text(text)
    return copied


def test_log_says_what_a_user_looks_for(tmp_path):
    config = write_config(tmp_path, training={"steps": 6}, validator={"enable": True, "freq": 100, "steps": 2})
    done = train(config)
    log = done.output
    assert re.search(r"step:  5  loss:\s+\d+\.\d+ .* tps: [\d,]+ .* time left: 0:00:0\d", log)
    validated = re.findall(r"validate step:\s+(\d+)  loss:\s+([\d.]+)", log)
    assert [step for step, _ in validated] == ["0", "6"]
    assert float(validated[1][1]) < float(validated[0][1])
    last = log.strip().splitlines()[-1]
    assert f"Checkpoint: {tmp_path}/out/checkpoint/step-6." in last
    assert f"tensorboard --logdir {tmp_path}/out/tb" in last
    assert f"python train.py {config} --training.steps 12" in last
    assert (tmp_path / "out/checkpoint/step-6/.metadata").is_file()
    assert losses(tmp_path / "out", "validation_metrics/loss").keys() == {0, 6}


def test_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    """SIGKILL after the checkpoint of step 4, while later steps train; the same command ends on the same numbers."""
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    killed = train(mine, check=False, kill_at=r"step:\s+6  loss")
    assert killed.returncode == -signal.SIGKILL, killed.output[-2000:]
    assert (tmp_path / "out/checkpoint/step-4/.metadata").is_file()
    shutil.rmtree(tmp_path / "out/checkpoint/step-8", ignore_errors=True)
    shutil.rmtree(tmp_path / "out/tb")
    assert "Training starts at step 5" in train(mine).output
    resumed = losses(tmp_path / "out")
    assert list(resumed) == list(range(5, 13))
    assert resumed == {step: expected[step] for step in resumed}


def test_half_written_checkpoint_is_not_picked(uninterrupted, tmp_path):
    """A folder without the metadata that a save writes last counts as no checkpoint, whatever else is in it."""
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    shutil.copytree(config.parent / "out/checkpoint", tmp_path / "out/checkpoint")
    shutil.copy(config.parent / "out/config.json", tmp_path / "out/config.json")
    (tmp_path / "out/checkpoint/step-12/.metadata").unlink()
    assert "Training starts at step 9" in train(mine).output
    resumed = losses(tmp_path / "out")
    assert resumed == {step: expected[step] for step in range(9, 13)}


def test_finished_run_continues_with_more_steps(uninterrupted, tmp_path):
    """Eight steps, then the same command with twelve, is twelve steps in one go; once done, it says so."""
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    train(mine, "--training.steps", "8")
    assert "Training starts at step 9" in train(mine, "--training.steps", "12").output
    assert losses(tmp_path / "out") == expected
    again = train(mine)
    assert f"Nothing left to do: {tmp_path}/out is at step 12 of 12." in again.output
    assert losses(tmp_path / "out") == expected


def test_another_model_does_not_continue_a_folder(uninterrupted, tmp_path):
    config, _ = uninterrupted
    mine = copy_run(config, tmp_path)
    shutil.copytree(config.parent / "out", tmp_path / "out")
    refused = train(mine, "--recipe_args.window", "4", check=False)
    assert refused.returncode == 2
    assert "holds checkpoints of another model" in refused.output
    assert "window was 8, is 4" in refused.output
    assert "--dump_folder" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, {"training.local_batch_size": 2}, id="fsdp-2"),
        pytest.param(2, {"parallelism.tensor_parallel_degree": 2}, id="tp-2"),
        pytest.param(
            4,
            {
                "training.local_batch_size": 2,
                "parallelism.tensor_parallel_degree": 2,
                "parallelism.data_parallel_replicate_degree": 2,
                "parallelism.data_parallel_shard_degree": 1,
            },
            id="replicate-2-tp-2",
        ),
        pytest.param(
            4,
            {
                "training.local_batch_size": 1,
                "parallelism.data_parallel_replicate_degree": 2,
                "parallelism.data_parallel_shard_degree": 2,
            },
            id="hsdp-2x2",
        ),
    ],
)
def test_ranks_agree_with_one_rank(uninterrupted, tmp_path, ranks, flags):
    """At the same global batch, more ranks change the order of sums and nothing else."""
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    set_to = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    train(mine, *set_to, "--training.steps", "5", ranks=ranks)
    actual = losses(tmp_path / "out")
    assert list(actual) == list(range(1, 6))
    for step, loss in actual.items():
        assert loss == pytest.approx(expected[step], rel=2e-5), step


@pytest.mark.parametrize("backend", ["spmd_types", "partial_dtensor"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"learned_initial_state": "true", "learned_qk_scale": "true"}, id="learned"),
        pytest.param({"decay_gate": "true", "global_rope": "true"}, id="decay-gate"),
        pytest.param({"layer_kind": "hymba", "decay_gate": "true", "model.n_kv_heads": "4"}, id="hymba"),
    ],
)
def test_layer_options_train_under_tensor_parallelism(tmp_path, options, backend):
    """What is split by heads and what is shared must begin alike and reduce alike."""
    flags = [part for k, v in options.items() for part in (f"--recipe_args.{k}", v)]
    runs = {}
    for ranks, extra in (
        (1, []),
        (2, ["--parallelism.tensor_parallel_degree", "2", "--parallelism.spmd_backend", backend]),
    ):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        train(write_config(folder), *flags, *extra, ranks=ranks)
        runs[ranks] = losses(folder / "out")
    assert len(runs[1]) == 8
    assert runs[2] == pytest.approx(runs[1], rel=2e-5)


def test_layer_options_compile_and_checkpoint_activations(tmp_path):
    """Per-block compilation without a break, FSDP2 and selective checkpointing train the same numbers."""
    flags = ["--recipe_args.layer_kind", "hymba", "--recipe_args.decay_gate", "true", "--training.steps", "2"]
    runs = []
    for name, ranks, extra in (
        ("eager", 1, []),
        # Without code generation: what is asked is that a block is one graph.
        ("compiled", 2, ["--compile.enable", "--compile.backend", "aot_eager", "--training.local_batch_size", "2"]),
    ):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, checkpoint={"enable": False})
        if name == "compiled":
            config.write_text(config.read_text() + "activation_checkpoint: selective\n")
        train(config, *flags, *extra, ranks=ranks)
        runs.append(losses(tmp_path / name / "out"))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_split_heads_refuse_half_a_pair(tmp_path):
    config = write_config(tmp_path)
    flags = ["--recipe_args.layer_kind", "hymba", "--parallelism.tensor_parallel_degree", "2"]
    refused = train(config, *flags, ranks=2, check=False)
    assert refused.returncode == 2
    assert "tensor_parallel_degree = 2 does not go with layer_kind 'hymba' and 2 KV heads" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(("policy", "name"), [("full", "FullAC"), ("selective", "RAttentionSelectiveAC")])
def test_activation_checkpointing_changes_no_bit(uninterrupted, tmp_path, policy, name):
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    mine.write_text(mine.read_text() + f"activation_checkpoint: {policy}\n")
    done = train(mine)
    assert f"Applied {name} activation checkpointing" in done.output
    assert losses(tmp_path / "out") == expected


def test_compiled_blocks_agree(uninterrupted, tmp_path):
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    done = train(mine, "--compile.enable", "--training.steps", "2")
    assert "Compiling each TransformerBlock with torch.compile" in done.output
    for step, loss in losses(tmp_path / "out").items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step


def test_checkpoint_of_two_ranks_resumes(uninterrupted, tmp_path):
    """A killed two-rank run continues with two ranks: the data stream of each rank is where it was."""
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    half = ["--training.local_batch_size", "2"]
    train(mine, *half, "--training.steps", "8", ranks=2)
    train(mine, *half, ranks=2)
    actual = losses(tmp_path / "out")
    assert list(actual) == list(expected)
    assert list(actual.values()) == pytest.approx(list(expected.values()), rel=2e-5)
    other = train(mine, "--training.steps", "16", check=False)
    assert other.returncode == 2
    assert "dp_world_size was 2, is 1" in other.output
    assert "Traceback" not in other.output


def test_torchrun(uninterrupted, tmp_path):
    """The README's command for several ranks, typed as there."""
    config, expected = uninterrupted
    mine = copy_run(config, tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = script(str(mine), "--training.local_batch_size", "2", "--training.steps", "4", launcher=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "out") == pytest.approx({step: expected[step] for step in range(1, 5)}, rel=2e-5)


DRAWN = {
    "window": 6,
    "local_mask": {"stochastic_window": {"low": 0, "high": 40}},
    "layer_masks": {"1": {"attention_sink": {"sinks": 2}}},
    "local_score_mod": {"soft_cap": {"cap": 20}},
    "layer_score_mods": {"-1": {"relative_bias": {"max_distance": 32}}},
}


def test_drawn_windows_resume_bit_for_bit_and_are_those_of_every_rank(tmp_path):
    """Sinks, windows drawn by step and a learned bias: stopped and continued is one go, two ranks are one rank."""
    config = write_config(tmp_path, recipe_args=DRAWN, validator={"enable": True, "freq": 3, "steps": 1})
    done = train(config)
    assert "stochastic_window" in done.output
    whole = losses(tmp_path / "out")
    (tmp_path / "resumed").mkdir()
    mine = copy_run(config, tmp_path / "resumed")
    train(mine, "--training.steps", "4")
    assert "Training starts at step 5" in train(mine).output
    assert losses(tmp_path / "resumed/out") == whole
    (tmp_path / "two").mkdir()
    two = copy_run(config, tmp_path / "two")
    train(two, "--training.local_batch_size", "2", "--validator.no-enable", ranks=2)
    assert losses(tmp_path / "two/out") == pytest.approx(whole, rel=2e-5)
