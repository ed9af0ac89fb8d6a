"""``lion-dist plan`` as a user calls it."""

from __future__ import annotations

import json

import pytest

from lion_dist import cli
from lion_dist.planning.estimates import PRECISIONS

GIB = 2**30


def planned(capsys, *arguments: str) -> dict:
    assert cli.main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def row(answer: dict, engine: str, precision: str = "bf16-split") -> dict:
    return next(p for p in answer["plans"] if (p["engine"], p["precision"]) == (engine, precision))


def test_json_has_every_precision_and_the_job(capsys):
    answer = planned(capsys, "--params", "7b", "--ranks", "64")
    assert answer["model"]["numel"] == 6_738_415_616
    assert (answer["job"]["ranks"], answer["job"]["nodes"]) == (64, 8)
    assert {p["precision"] for p in answer["plans"]} == set(PRECISIONS)
    found = row(answer, "ShardedLion stage 2")
    assert found["total_bytes"] == sum(found["bytes"].values())
    assert "fits" not in found and "communication_seconds_per_step" not in found and "activations" not in found["bytes"]


def test_what_fits_leaves_two_gib_free(capsys):
    needed = row(planned(capsys, "--params", "7b", "--ranks", "8"), "ShardedLion stage 2")["total_bytes"] / GIB
    for free, fits in ((1.9, False), (2.1, True)):
        answer = planned(capsys, "--params", "7b", "--ranks", "8", "--gpu-mem", f"{needed + free}GiB")
        assert row(answer, "ShardedLion stage 2")["fits"] is fits


def test_activation_checkpointing_keeps_less(capsys):
    job = "--params 7b --ranks 8 --micro-batch 4 --seq-len 2048".split()
    whole = row(planned(capsys, *job), "FSDP2 + Lion")["bytes"]["activations"]
    checkpointed = row(planned(capsys, *job, "--checkpointing"), "FSDP2 + Lion")["bytes"]["activations"]
    assert 0 < checkpointed < whole / 5


def test_bandwidth_gives_seconds(capsys):
    answer = planned(capsys, *"--params 1b --ranks 8 --bandwidth 100/10".split())
    found = row(answer, "ShardedLion stage 2")
    sent = sum(found["sent_bytes_per_step"].values())
    assert found["communication_seconds_per_step"] == pytest.approx(sent / 100e9)  # one node


def test_tables_show_engines_verdicts_and_what_is_an_estimate(capsys):
    job = "--params 70b --ranks 64 --gpu-mem 80GiB --micro-batch 1 --bandwidth 300/40 --accumulate 4 --checkpointing"
    assert cli.main(["plan", *job.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = "\n".join(lines)
    assert "70b: 68.98 B parameters in 723 tensors (the shapes of Llama 2 70B)" in printed
    assert "64 ranks on 8 nodes of 8, 80 GiB each, micro-batch 1 x 4096 tokens, activation checkpointing" in printed
    assert all(f"\n{engine} " in printed for engine in ("DDP + Lion", "ShardedLion stage 2, hybrid", "FSDP2 + Lion"))
    assert " yes " in printed and " no " in printed and "an estimate" in printed
    assert max(map(len, lines)) <= 120


def test_adamw_stands_beside_every_precision_and_a_number_is_a_model(capsys):
    for precision in PRECISIONS:
        assert cli.main(["plan", "--params", "6.7e9", "--ranks", "8", "--precision", precision]) == 0
        detailed = capsys.readouterr().out.split("all precisions")[0]
        assert all(f"\n{engine}" in detailed for engine in ("DDP + AdamW", "DDP + ZeRO-1 AdamW", "FSDP2 + AdamW"))
        assert "made up, shaped like Llama" in detailed


def test_tables_without_memory_and_bandwidth_give_no_verdict(capsys):
    assert cli.main(["plan", "--params", "1b", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "fits" not in printed and "seconds" not in printed and "pass --micro-batch" in printed


def test_an_average_of_the_weights_is_a_column_of_its_own(capsys):
    assert cli.main(["plan", "--params", "1b", "--ranks", "8", "--average", "fp32"]) == 0
    assert "momentum  average  grads" in capsys.readouterr().out
    by_average = [
        planned(capsys, "--params", "1b", "--ranks", "8", *options)["plans"] for options in ([], ["--average", "bf16"])
    ]
    (plain,), (averaged,) = (
        [p for p in plans if (p["engine"], p["precision"]) == ("ShardedLion stage 2", "bf16-split")]
        for plans in by_average
    )
    assert (
        averaged["total_bytes"] - plain["total_bytes"] == averaged["bytes"]["weight_avg"] == plain["bytes"]["exp_avg"]
    )


def test_a_hugging_face_config_is_read(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
        })
    )  # fmt: skip
    answer = planned(capsys, "--params", str(tmp_path), "--ranks", "2")
    attention = 32 * (32 + 16 + 16) + (32 + 16 + 16) + 32 * 32  # with biases, which the formula does not know
    assert answer["model"]["numel"] == 2 * 50 * 32 + 2 * (attention + 3 * 32 * 48 + 2 * 32) + 32
    assert answer["model"]["source"].startswith("Qwen2ForCausalLM of transformers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--params 9z --ranks 8", "--params 9z: neither a file nor one of 1b, 3b"),
        ("--params 7b --ranks 0", "ranks must be at least 1, got 0"),
        ("--params 7b --ranks 8 --nodes 3", "8 ranks do not spread evenly over 3 nodes"),
        ("--params 7b --ranks 8 --micro-batch 0", "--micro-batch must be at least 1, got 0"),
        ("--params 7b --ranks 8 --gpu-mem lots", "'lots' is not a size; write 80GiB"),
        ("--params 7b --ranks 8 --gpu-mem .", "'.' is not a size; write 80GiB"),
        ("--params 7b --ranks 8 --bandwidth 300", "'300': two numbers above 0"),
    ],
)
def test_what_cannot_be_planned_exits_with_2_and_a_remedy(arguments, message, capsys):
    try:
        code = cli.main(["plan", *arguments.split()])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"hidden_size": 3}', 'has no "model_type"'),
        ('{"model_type": ["llama"]}', 'has no "model_type"'),
        ('{"model_type": "no-such-model"}', "'no-such-model' (KeyError: 'it has no such model type')."),
        ('{"model_type": "vit"}', "makes no causal language model of 'vit'"),
    ],
)
def test_a_config_that_is_none_says_why(text, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["plan", "--params", str(path), "--ranks", "2"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 600


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize("installed", [True, False], ids=["transformers", "formula"])
@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("num_attention_heads", 0, "0"),
        ("hidden_size", "64", '"64"'),
        ("hidden_size", None, "null"),
        ("vocab_size", True, "true"),
    ],
)
def test_a_size_that_makes_no_sense_is_named_with_its_value(
    name, value, shown, installed, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {name: value}))
    if not installed:
        monkeypatch.setattr("lion_dist.planning.model_shapes.importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", "--params", str(path), "--ranks", "2"]) == 2
    error = capsys.readouterr().err
    assert f'"{name}" must be a whole number of at least 1, got {shown}. Correct it, or pass a preset' in error
    assert error.count("\n") == 1


def test_whatever_a_models_own_code_says_of_a_wrong_value_is_one_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"intermediate_size": "128"}))
    assert cli.main(["plan", "--params", str(path), "--ranks", "2"]) == 2
    error = capsys.readouterr().err
    assert "Field 'intermediate_size' expected int, got str" in error and error.count("\n") == 1


def test_sizes_of_a_model_that_also_sees_are_those_of_its_text_part(tmp_path, capsys):
    text = LLAMA | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": vision}))
    answer = planned(capsys, "--params", str(path), "--ranks", "2", "--micro-batch", "1", "--seq-len", "8")
    path.write_text(json.dumps(text))
    text_only = planned(capsys, "--params", str(path), "--ranks", "2", "--micro-batch", "1", "--seq-len", "8")
    assert answer["model"]["numel"] > text_only["model"]["numel"]
    activations = [row(a, "FSDP2 + Lion")["bytes"]["activations"] for a in (answer, text_only)]
    assert activations[0] == activations[1]


def test_without_transformers_other_models_are_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "qwen2"}')
    monkeypatch.setattr("lion_dist.planning.model_shapes.importlib.util.find_spec", lambda name: None)
    assert cli.main(["plan", "--params", str(path), "--ranks", "2"]) == 2
    assert "pip install transformers" in capsys.readouterr().err


# ---- composed jobs


def test_a_rank_of_a_composed_job_has_a_part_of_the_model_and_shares_its_state(capsys):
    whole = row(planned(capsys, *"--params 70b --ranks 64 --nodes 8".split()), "ShardedLion stage 2")["bytes"]
    axes = "--params 70b --ranks 1024 --nodes 128 --tensor-parallel 8 --pipeline-parallel 2".split()
    part = row(planned(capsys, *axes), "ShardedLion stage 2")["bytes"]
    assert part["params"] == pytest.approx(whole["params"] / 16, rel=0.02)
    assert part["exp_avg"] == pytest.approx(part["params"] / 64, rel=0.02)  # 64 data-parallel ranks


def test_a_data_parallel_rank_of_another_node_is_reached_across(capsys):
    """8 x 8 tensor-parallel ranks: every data-parallel neighbour is on another node."""
    job = "--params 7b --ranks 64 --nodes 8 --bandwidth 300/40 --tensor-parallel 8".split()
    found = row(planned(capsys, *job), "ShardedLion stage 2")
    sent = sum(found["sent_bytes_per_step"].values())
    assert found["communication_seconds_per_step"] == pytest.approx(sent / 40e9)


def test_activations_of_model_axes_are_sent(capsys):
    job = "--params 7b --ranks 8 --micro-batch 1 --seq-len 1024 --accumulate 4".split()
    axes = "--tensor-parallel 2 --pipeline-parallel 2".split()
    found = row(planned(capsys, *job, *axes), "ShardedLion stage 2")
    values = 4 * 1024 * 4096 * 2
    assert found["sent_bytes_per_step"]["send activations (pipeline)"] == 2 * values
    assert found["sent_bytes_per_step"]["all-reduce activations (tensor parallel)"] == 4 * values * 16  # of 16 layers


def test_context_parallel_divides_activations_and_nothing_else(capsys):
    job = "--params 7b --ranks 8 --micro-batch 1".split()
    alone, shared = (
        row(planned(capsys, *job, "--context-parallel", n), "ShardedLion stage 2")["bytes"] for n in ("1", "4")
    )
    assert shared.pop("activations") == pytest.approx(alone.pop("activations") / 4)
    assert shared == alone


def test_experts_are_divided_and_shared_by_fewer_ranks(capsys):
    job = "--params mixtral-8x7b --ranks 64".split()
    alone, divided = (
        row(planned(capsys, *job, "--expert-parallel", n), "ShardedLion stage 2")["bytes"] for n in ("1", "8")
    )
    assert divided["params"] < alone["params"] / 5
    assert divided["exp_avg"] == pytest.approx(alone["exp_avg"], rel=0.01)  # 1/64 of the dense part, 1/8 of 1/8


def test_two_levels_keep_1_n_of_the_state_and_send_each_gradient_across_once_a_node(capsys):
    answer = planned(capsys, *"--params 7b --ranks 64 --nodes 8".split())
    names = "ShardedLion stage 2", "ShardedLion stage 2, hybrid", "ShardedLion 2 levels"
    flat, hybrid, levels = (row(answer, name) for name in names)
    assert levels["bytes"]["exp_avg"] == flat["bytes"]["exp_avg"] < hybrid["bytes"]["exp_avg"] / 7
    across = sum(sent for what, sent in levels["sent_bytes_per_step"].items() if "across" in what)
    assert across * 8 == pytest.approx(answer["model"]["numel"] * (2 + 2) * 7 / 8, rel=0.01)  # a node of 8 ranks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--params 7b --ranks 8 --tensor-parallel 3", "not a multiple of 3"),
        ("--params 7b --ranks 64 --pipeline-parallel 64", "the model has 32 blocks"),
        ("--params 7b --ranks 8 --expert-parallel 2", "no stack of experts"),
        ("--params 7b --ranks 8 --context-parallel 0", "at least 1"),
    ],
)
def test_axes_that_no_job_has(capsys, arguments, words):
    assert cli.main(["plan", *arguments.split()]) == 2
    assert words in capsys.readouterr().err
