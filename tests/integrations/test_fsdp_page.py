"""Every Python block of docs/fsdp.md, run as it stands on four ranks; only the names of devices are other ones."""

import ast
import re
from pathlib import Path

import pytest
import torch

from lion_dist import Lion
from tests.integrations.fsdp_ranks import Net, inputs, mesh_of

PAGE = (Path(__file__).parents[2] / "docs" / "fsdp.md").read_text()
ON_CPUS = {
    '"cuda"': '"cpu"',
    "CPUOffloadPolicy()": "CPUOffloadPolicy(pin_memory=False)",
    "block.compile()": 'block.compile(backend="aot_eager")',
}


def blocks_by_heading() -> dict[str, str]:
    found = {}
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]:
        code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        if code:
            assert len(code) == 1, "one block a section: it is its test's name"
            found[section.split("\n")[0]] = code[0]
    return found


BLOCKS = blocks_by_heading()
IMPORTS = "\n".join(
    ast.unparse(line) for code in BLOCKS.values() for line in ast.parse(code).body if isinstance(line, ast.ImportFrom)
)  # each block shows those that are new in it


def run_block(code: str, path: Path) -> None:
    for on_gpus, on_cpus in ON_CPUS.items():
        code = code.replace(on_gpus, on_cpus)
    mesh_of(shard=4)  # forgets the meshes of other tests
    names = {"torch": torch, "model": Net(), "batches": [inputs(i) for i in range(3)]}
    names |= {"device": torch.device("cpu"), "path": path}
    exec(f"{IMPORTS}\n{code}", names)
    optimizers = names.get("optimizers", {None: names.get("opt")}).values()
    momenta = [state["exp_avg"] for opt in optimizers for state in opt.state.values()]
    assert len(momenta) >= 3 and all(isinstance(opt, Lion) for opt in optimizers)
    assert any(getattr(m, "_local_tensor", m).any() for m in momenta), "nothing was trained"


@pytest.mark.parametrize("heading", BLOCKS)
def test_block(gloo, tmp_path, heading):
    gloo.run(4, run_block, BLOCKS[heading], tmp_path / "checkpoint")


def test_files_that_the_page_names_are_there():
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target
