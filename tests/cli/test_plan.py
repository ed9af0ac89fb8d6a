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
