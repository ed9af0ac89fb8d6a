"""What the guides say can be run, runs; what they point to is there; the messages that they explain exist."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUNNABLE = ("quick-start.md", "precision.md")
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")], key=lambda page: page.name)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


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
    program = "\n".join(f"exec(compile({code!r}, {name!r}, 'exec'), {{}})" for name, code in blocks)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | ranks | {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index] == []


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
