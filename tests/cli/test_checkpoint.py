"""``lion-dist checkpoint``, through its parser."""

import os
import zipfile

import pytest
import torch
from torch import nn

from lion_dist import Lion, checkpoint
from lion_dist.cli import main


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    checkpoint.save(tmp_path / "c", model=model, optimizer=Lion(model.parameters(), lr=2e-4), extra={"step": 7})
    return tmp_path / "c"


def test_inspect_prints_tensors_groups_and_extra(saved, capsys):
    assert main(["checkpoint", "inspect", str(saved), "--tensors"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model", "2", "bfloat16", "15", "0.00"] in lines
    assert ["main_param", "2", "int16", "15", "0.00"] in lines
    assert "param group 0: 2 parameters, lr 0.0002, betas [0.9, 0.99], weight_decay 0.0".split() in lines
    assert "extra: step = 7".split() in lines
    assert ["optimizer.weight.exp_avg", "3x4", "bfloat16", "1"] in lines


def test_verify_says_whole_or_names_the_damaged_file_and_exits_with_1(saved, capsys):
    assert main(["checkpoint", "verify", str(saved)]) == 0
    assert "whole" in capsys.readouterr().out
    content = bytearray((saved / "__0_0.distcp").read_bytes())
    content[100] ^= 1
    (saved / "__0_0.distcp").write_bytes(content)
    assert main(["checkpoint", "verify", str(saved)]) == 1
    assert "__0_0.distcp is damaged: its CRC-32 is" in capsys.readouterr().err


def test_convert_to_lion_pytorch_and_back(saved, tmp_path, capsys):
    assert main(["checkpoint", "convert", str(saved), str(tmp_path / "one.pt"), "--to", "lion-pytorch"]) == 0
    assert torch.load(tmp_path / "one.pt", weights_only=True)["model"]["weight"].shape == (3, 4)
    assert main(["checkpoint", "convert", str(tmp_path / "one.pt"), str(tmp_path / "back"), "--to", "lion-dist"]) == 0
    checkpoint.verify(tmp_path / "back")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "nothing"], "no checkpoint at nothing"),
        (["verify", "nothing"], "there is nothing at nothing"),
        (["convert", "nothing", "one.pt", "--to", "lion-pytorch"], "no checkpoint at nothing"),
        (["convert", "nothing", "c", "--to", "lion-dist"], "nothing is no file"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(["checkpoint", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_verify_and_inspect_of_where_one_stands(saved, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    for path in (".", "", "../c/.", f"../../{saved.parent.name}/c/."):
        assert main(["checkpoint", "verify", path]) == 0
        assert main(["checkpoint", "inspect", path]) == 0
    assert "whole" in capsys.readouterr().out


def odd_paths(folder):
    (folder / "text").write_text("dear")
    (folder / "empty").touch()
    (folder / "directory").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    return ["/", "..", "text", "empty", "directory", "loop", "fifo", "/dev/zero", "x" * 300, "text/in"]


@pytest.mark.parametrize(
    "arguments", [("verify",), ("inspect",), ("convert", "lion-pytorch"), ("convert", "lion-dist")], ids="-".join
)
def test_odd_paths_are_one_line_and_no_traceback(saved, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    action, *to = arguments
    for path in odd_paths(tmp_path):
        given = [action, path, "out", "--to", *to] if to else [action, path]
        assert main(["checkpoint", *given]) in (1, 2), path
        error = capsys.readouterr().err
        assert error.count("\n") == 1, (path, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["/", ".", "..", "text", "fifo", "nowhere/c", "text/c", "x" * 300])
def test_odd_targets_are_one_line_and_no_traceback(saved, tmp_path, monkeypatch, capsys, target):
    monkeypatch.chdir(tmp_path)
    odd_paths(tmp_path)
    assert main(["checkpoint", "convert", "c", "one.pt", "--to", "lion-pytorch"]) == 0
    capsys.readouterr()
    for source, to in (("c", "lion-pytorch"), ("one.pt", "lion-dist")):
        if (target, to) == ("nowhere/c", "lion-dist"):
            continue  # its folder is made
        assert main(["checkpoint", "convert", source, target, "--to", to]) == 2, target
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error


def test_a_compressed_zip_is_no_file_of_torch_save(saved, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("z/data.pkl", b"0" * 10_000)
    assert main(["checkpoint", "convert", str(tmp_path / "z.pt"), str(tmp_path / "o"), "--to", "lion-dist"]) == 2
    assert "is a compressed zip" in capsys.readouterr().err
