"""What the guides say can be run, runs; what they point to is there; the messages that they explain exist."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch

import lion_dist
from lion_dist import checkpoint
from tests import preloaded
from tests.launch import jobs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUNNABLE = ("quick-start.md", "precision.md", "huggingface.md", "frameworks.md")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")], key=str)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_python_of_the_guides_runs(tmp_path):
    """On one rank, as torchrun would start it, one block after the other in one process."""
    blocks = [(f"{page}, block {i}", code) for page in RUNNABLE for i, code in enumerate(snippets(DOCS / page))]
    assert len(blocks) >= 4
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    # As at the end of a program and the start of the next: frameworks leave a process group, or take variables away.
    end = f"import os, torch.distributed as dist\nos.environ.update({ranks!r})\n"
    end += "if dist.is_initialized(): dist.destroy_process_group()"
    program = "\n".join(f"exec(compile({code!r}, {name!r}, 'exec'), {{}})\n{end}" for name, code in blocks)
    environment = os.environ | ranks | {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [preloaded.python(), "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    """To a file or folder of the repository, and to a heading in it where one is named."""
    missing = []
    for target, anchor in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(f"{target}#{anchor}")
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_that_a_page_starts_are_there(page):
    text = page.read_text()
    files = re.findall(r"(?<![\w/])launch/[\w/-]+\.(?:py|json|yaml|sbatch)", text)
    modules = re.findall(r"-m (lion_dist[\w.]+)", text)
    files += [module.replace(".", "/") for module in modules]
    assert [name for name in files if not ((ROOT / name).exists() or (ROOT / f"{name}.py").exists())] == []


README = (ROOT / "README.md").read_text()


def test_the_readme_is_read_in_two_minutes():
    assert len(README.encode()) < 7_000


def test_the_fifteen_lines_of_the_readme_print_what_it_says(tmp_path):
    (program,) = snippets(ROOT / "README.md")
    (printed,) = re.findall(r"^```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len([line for line in program.splitlines() if line]) == 15
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = jobs.torchrun(2, "program.py")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Workers of torchrun write unbuffered, a text and its line end apart: one rank's line can end in another's.
    assert sorted(re.findall("rank .*?momentum", done.stdout)) == printed.splitlines()


def test_the_readmes_numbers_of_speed_have_their_command_machine_and_date():
    speed = (DOCS / "speed.md").read_text()
    section = README[README.index("## Speed") : README.index("## Guarantees")]
    numbers = re.findall(r"[\d.]+ to [\d.]+\d|\d+\.\d+", section[section.index("Forward and backward") :])
    assert len(numbers) >= 5
    machine = speed[speed.index("### Two H100") : speed.index("### Two H200")]
    assert [number for number in numbers if number not in machine] == []
    assert re.search(r"2026-11-27, two NVIDIA H100", machine) and "benchmarks.step" in machine


def test_the_readmes_bytes_are_those_of_the_defaults():
    from lion_dist import PrecisionPolicy

    policy = PrecisionPolicy()
    assert policy.main_params_for(torch.bfloat16) == "split"
    assert policy.momentum_dtype_for(torch.bfloat16) == torch.bfloat16
    for cells, gigabytes in (("2 + 2 + 2 = 6", 6 * 7), ("2 + 2/N + 2/N", (2 + 4 / 8) * 7), ("2 + 4 + 8 = 14", 14 * 7)):
        row = next(line for line in README.splitlines() if cells in line)
        assert f"{gigabytes:g} GB" in row


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


FRAMEWORKS = ("Trainer", "Accelerate", "Lightning", "TRL", "PEFT", "DeepSpeed", "torchtitan-like loop")
FEATURES = ["clip", "accumulate", "resume", "other ranks", "compile", "bf16", "fp16"]
KEY = re.compile(r"\b[A-Z]\d+\b")
OF_THE_TABLE = (DOCS / "frameworks.md").read_text().split("\n## ")[1]


def cells_of(table: str) -> dict[str, list[str]]:
    """Row by row: {what its first cell says: the other cells}."""
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in rows}


def names_of_tests(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("kind", ["Lion", "ShardedLion"])
def test_each_cell_of_class_framework_and_feature_names_a_test_or_who_refuses(kind):
    known = {key for key, _ in re.findall(r"^\| (\w+) \| `(.+)` \|$", OF_THE_TABLE, re.MULTILINE)}
    cells = cells_of(OF_THE_TABLE.split(f"**`{kind}`**")[1].split("**")[0].split("\n\n")[1])
    assert cells.pop("") == FEATURES
    del cells["---"]
    assert [name.split(", ")[0] for name in cells] == list(FRAMEWORKS)
    for row in cells.values():
        assert len(row) == len(FEATURES)
        assert all(set(KEY.findall(cell)) & known or cell == "not tested" for cell in row)
        assert {key for cell in row for key in KEY.findall(cell) if key[0] in "TALDRFS"} <= known


def test_the_tests_that_the_table_of_frameworks_names_are_there():
    named = re.findall(r"^\| (\w+) \| `(.+)::(.+)` \|$", OF_THE_TABLE, re.MULTILINE)
    assert len(named) > 30
    assert [key for key, file, test in named if test not in names_of_tests(ROOT / "tests" / file)] == []
    used = set(KEY.findall(OF_THE_TABLE.split("| key | test |")[0]))
    assert {key for key, _, _ in named} == used


def test_the_tests_that_the_page_of_hugging_face_names_are_there():
    text = (DOCS / "huggingface.md").read_text()
    there = names_of_tests(ROOT / "tests/integrations/test_trainer.py") | names_of_tests(
        ROOT / "tests/integrations/test_accelerate.py"
    )
    assert set(re.findall(r"`(test_\w+)`", text)) <= there


def message_parts() -> list[str]:
    """The longest fixed part of each message in the FAQ's tables, between the `...` for what varies."""
    rows = re.findall(r"^\| `(.+?)`", (DOCS / "faq.md").read_text(), re.MULTILINE)
    parts = [max(re.split(r"\.\.\.|\"", row), key=len).strip() for row in rows]
    return [part for part in parts if len(part) > 12]


def test_the_faq_explains_messages_that_the_code_has():
    sources = [*(ROOT / "lion_dist").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    code = "\n".join(source.read_text() for source in sources)
    # Messages are written as adjacent string literals: join them.
    code = re.sub(r"[\"']\s*\n\s*f?[\"']", "", code)
    parts = message_parts()
    assert len(parts) > 40
    assert [part for part in parts if part not in code] == []


def public_names() -> list[tuple[str, object]]:
    found = [(name, getattr(module, name)) for module in (lion_dist, checkpoint) for name in module.__all__]
    methods = [
        (f"{name}.{key}", value)
        for name, kind in found
        if isinstance(kind, type)
        for key, value in vars(kind).items()
        if not key.startswith("_") and callable(value)
    ]
    return found + methods


@pytest.mark.parametrize(("name", "value"), public_names(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_public_name_is_described_in_the_reference(name, value):
    assert value.__doc__ and not value.__doc__.startswith(f"{getattr(value, '__name__', '')}("), name
