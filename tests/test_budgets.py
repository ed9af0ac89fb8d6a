"""The size of the house. These numbers are what is reached: a change may lower them, and none may raise them.

A file that has outgrown its budget is cut along a seam; a config or a program that wants one more field or flag gives
up another, or shows that no user can do without.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lion_dist
from lion_dist import PrecisionPolicy, ShardedLion, ShardingConfig

PACKAGE = Path(lion_dist.__file__).parent
ROOT = PACKAGE.parent
# Beside the core: each can be deleted without a change in another (test_rooms.py).
BESIDE = (
    "metrics",
    "replica_check.py",
    "coded_sync",
    "peer_memory",
    "composed",
    "two_levels",
    "spike_guard",
    "ddp_takeover.py",
    "uneven_inputs.py",
    "captured_step.py",
    "weight_swap.py",
    "guards",
    "cpu_backend",
    "triton_backend",
    "update_in_backward",
    "grad_scaler.py",
)
ROOMS = (*BESIDE, "checkpoint", "integrations", "planning", "cli", "benchmarks")
SHOWN_BY_PROGRAMS = "reporting.py"  # by cli/, benchmarks/ and launch/; the core does without

LINES_OF_A_FILE = 400
LINES_OF_LONGER_FILES: dict[str, int] = {}
LINES_OF_THE_CORE = 6_358  # those below, kernels/ and sharding/
CORE_FILES = (
    "lion.py sharded_lion.py shard_state.py local_shard.py boxes.py boxed_tensor.py version_tracker.py config.py "
    "sharded_optimizer.py full_params.py param_sync.py shard_builder.py step_gradients.py "
    "optional_guards.py update_terms.py lion_batches.py".split()
)
# The core and whatever else no room holds. Cutting the last two files of over 400 lines cost 74 lines of headers.
LINES_OUTSIDE_ROOMS = 8_791
FIELDS = {
    PrecisionPolicy: 5,
    ShardingConfig: 11,
}  # one more for held references, on request
FLAGS_OF_THE_TRAINING_PROGRAM = 24  # one more for Weights & Biases, on request
ATTRIBUTES_OF_SHARDED_LION = 18  # beside those of every torch.optim.Optimizer

PROGRAMS = ("cli", "benchmarks")  # start process groups, and measure torch's own collectives
DOOR = "sharding/collectives.py"  # nobody else calls a collective of torch.distributed
# Who else names torch.distributed in its code, beside programs and checkpoint/ (which is made of its checkpoints).
NAMERS_OF_TORCH_DISTRIBUTED = {
    "weight_swap.py",  # FSDP2's modules
    "boxed_tensor.py",  # what torch.distributed.checkpoint asks of a tensor
    "composed/axes.py",
    "composed/clip.py",
    "composed/model_parallel.py",  # types of meshes and groups
    "composed/places.py",  # the type of a group
    "two_levels/levels.py",  # types of meshes and groups
    "state_dict/full_state.py",
    "grad_placement.py",
    "grad_scaler.py",
    "lion.py",  # the type of metrics(process_group)
    "integrations/pipelining.py",  # its stages
    "local_shard.py",
    "metrics/step_metrics.py",
    "replica_check.py",
    "sharded_lion.py",  # the type of process_group
    "sharded_params.py",
    "guards/agreement.py",
    "sharding/collective_error.py",
    "guards/own_groups.py",
    "peer_memory/connect.py",  # the type of a group
    "peer_memory/memory.py",
    "sharding/process_groups.py",
    "guards/step_agreement.py",
    "uneven_inputs.py",  # torch's Join
}
COLLECTIVES = frozenset(
    "all_reduce reduce reduce_scatter reduce_scatter_tensor reduce_scatter_single all_gather all_gather_single "
    "all_gather_into_tensor all_gather_object all_to_all all_to_all_single broadcast broadcast_object_list barrier "
    "gather gather_object scatter scatter_object_list send recv isend irecv batch_isend_irecv".split()
)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def outside_rooms() -> dict[str, Path]:
    files = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path for name, path in files.items() if name.split("/")[0] not in (*ROOMS, SHOWN_BY_PROGRAMS)}


def is_core(name: str) -> bool:
    return name in CORE_FILES or name.startswith(("kernels/", "sharding/"))


def test_no_file_grows_beyond_its_budget():
    too_long = {}
    for name, path in outside_rooms().items():
        if lines(path) > LINES_OF_LONGER_FILES.get(name, LINES_OF_A_FILE):
            too_long[name] = lines(path)
    assert not too_long


def test_a_file_that_has_become_short_enough_is_no_exception_any_more():
    files = outside_rooms()
    assert [n for n in LINES_OF_LONGER_FILES if n not in files or lines(files[n]) <= LINES_OF_A_FILE] == []


def test_lines_of_the_core():
    assert sum(lines(path) for name, path in outside_rooms().items() if is_core(name)) <= LINES_OF_THE_CORE


def test_lines_that_no_room_holds():
    assert sum(map(lines, outside_rooms().values())) <= LINES_OUTSIDE_ROOMS


@pytest.mark.parametrize("config", FIELDS, ids=lambda config: config.__name__)
def test_fields_of_the_configs(config):
    assert len(dataclasses.fields(config)) <= FIELDS[config]


def test_attributes_of_sharded_lion():
    model = torch.nn.Linear(2, 2)
    opt = ShardedLion(model.parameters(), module=model)
    every_optimizers = vars(torch.optim.SGD(model.parameters(), lr=1.0))
    assert len(vars(opt).keys() - every_optimizers.keys()) <= ATTRIBUTES_OF_SHARDED_LION


def flags_of(path: Path) -> set[str]:
    """The option strings of the program's ``add(...)`` and ``add_argument(...)`` calls."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    first = [call.args[0] for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    return {str(arg.value) for arg in first if str(arg.value).startswith("--")}


def test_flags_of_the_training_program():
    assert len(flags_of(ROOT / "launch" / "train.py")) <= FLAGS_OF_THE_TRAINING_PROGRAM


# ---- torch.distributed


class Names(ast.NodeVisitor):
    """Whether a file names torch.distributed in its code, and which collectives of it."""

    def __init__(self, path: Path):
        self.is_named, self.collectives = False, set()
        self._aliases = {"torch.distributed"}
        self.visit(ast.parse(path.read_text()))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.startswith("torch.distributed"):
                self.is_named = True
                self._aliases.add(alias.asname or alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for alias in node.names:
            if module.startswith("torch.distributed") or f"{module}.{alias.name}" == "torch.distributed":
                self.is_named = True
                if alias.name in COLLECTIVES:
                    self.collectives.add(alias.name)
                elif module == "torch":
                    self._aliases.add(alias.asname or alias.name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._note(ast.unparse(node.value), node.attr)
        self.is_named |= ast.unparse(node) == "torch.distributed"
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
            self._note(ast.unparse(node.args[0]), node.args[1].value)
        self.generic_visit(node)

    def _note(self, owner: str, attribute: str) -> None:
        if owner in self._aliases and attribute in COLLECTIVES:
            self.collectives.add(attribute)


def names_by_file() -> dict[str, Names]:
    return {str(path.relative_to(PACKAGE)): Names(path) for path in sorted(PACKAGE.rglob("*.py"))}


def test_one_door_to_the_collectives():
    callers = {name: found.collectives for name, found in names_by_file().items() if found.collectives}
    assert {name: calls for name, calls in callers.items() if name.split("/")[0] not in PROGRAMS}.keys() == {DOOR}


def test_who_names_torch_distributed():
    namers = {name for name, found in names_by_file().items() if found.is_named}
    elsewhere = {name for name in namers if name.split("/")[0] not in (*PROGRAMS, "checkpoint")}
    assert elsewhere - NAMERS_OF_TORCH_DISTRIBUTED - {DOOR} == set()


@pytest.mark.parametrize(
    "code",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.broadcast(x, 0)",
        "from torch import distributed\nattempt(distributed.barrier)",
        "from torch.distributed import all_gather",
        "import torch.distributed as dist\ngetattr(dist, 'all_to_all_single')(x)",
    ],
)
def test_a_collective_is_found_however_it_is_written(tmp_path, code):
    (tmp_path / "caller.py").write_text(code)
    found = Names(tmp_path / "caller.py")
    assert found.is_named and found.collectives


# ---- launch/

PUBLIC = {
    "lion_dist": set(lion_dist.__all__) | {"checkpoint"},
    "lion_dist.checkpoint": None,  # its __all__
    "lion_dist.reporting": None,
    "lion_dist.integrations.deepspeed": {"lion_optimizer", "register", "unregister"},
    "lion_dist.integrations.pipelining": {"reduce_in_last_backward"},
}


def imports_of(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) of every import; name None: the module itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.py")), ids=lambda path: path.stem)
def test_launch_imports_public_names_only(path):
    private = []
    for module, name in imports_of(path):
        if module.split(".")[0] != "lion_dist":
            continue
        names = PUBLIC.get(module, set())
        if names is None:
            names = set(importlib.import_module(module).__all__)
        if module not in PUBLIC or (name is not None and name not in names):
            private.append((module, name))
    assert private == []


def test_the_training_program_is_one_file():
    """Of ours it imports lion_dist and nothing else; the rest is Python's and what `pip` installs."""
    neighbours = {path.stem for path in (ROOT / "launch").iterdir()} | {"tests"}
    modules = {module.split(".")[0] for module, _ in imports_of(ROOT / "launch" / "train.py")}
    assert not modules & neighbours
    others = modules - {"lion_dist"} - sys.stdlib_module_names
    assert all(importlib.util.find_spec(name) is not None for name in others) and "lion_dist" in modules
