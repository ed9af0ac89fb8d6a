"""What a user's type checker sees of the public names: a right program passes, and mistakes in it are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = """
import torch
from lion_dist import CapturedStep, GradScaler, Lion, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint

model = torch.nn.Linear(3, 3)
sharding, precision = ShardingConfig(zero_stage=1), PrecisionPolicy(main_params="fp32")
opt = ShardedLion(model.parameters(), lr=1e-4, module=model, sharding=sharding, precision=precision)
with opt.no_sync():
    model(torch.ones(3)).sum().backward()
norm: torch.Tensor = opt.clip_grad_norm_(1.0)
GradScaler().step(opt)
measured: dict[str, object] = opt.metrics()
plain = Lion(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 1.0)
checkpoint.save("a", model=model, optimizer=opt)
"""
MISTAKES = ['ShardingConfig(zero_stage="two")', 'opt.clip_grad_norm_("1.0")', "Lion(model.parameters(), beta=0.9)"]
CHECKERS = {
    "mypy": ["mypy", "--strict", "--follow-imports=silent", "--cache-dir=cache"],
    "pyrefly": ["pyrefly", "check", "-c", "pyrefly.toml"],
}


@pytest.fixture(scope="module")
def lines_with_errors(tmp_path_factory):
    """``lines_with_errors(checker)``: where it finds errors in the right program with the mistakes behind it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "program.py").write_text(RIGHT + "\n".join(MISTAKES) + "\n")
    (folder / "pyrefly.toml").write_text(f'search-path = ["{ROOT}"]\npython-interpreter-path = "{sys.executable}"\n')

    def check(checker: str) -> list[int]:
        program = Path(sys.executable).with_name(CHECKERS[checker][0])
        command = [str(program), *CHECKERS[checker][1:], "program.py"]
        environment = os.environ | {"MYPYPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        places = [part for part in done.stdout.split() if part.startswith("program.py:")]
        assert places, done.stdout + done.stderr
        return sorted({int(place.split(":")[1]) for place in places})

    return check


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_type_checker_finds_the_mistakes_and_nothing_else(lines_with_errors, checker):
    first = len(RIGHT.splitlines()) + 1
    assert lines_with_errors(checker) == list(range(first, first + len(MISTAKES)))


def test_the_package_says_that_it_has_types():
    assert (ROOT / "lion_dist" / "py.typed").exists()
