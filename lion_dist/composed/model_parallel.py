"""What a program says about the ranks that hold other parts of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from lion_dist import values

CutDim = Callable[[str, Parameter], int | None]


@dataclass(frozen=True)
class ModelParallel:
    """The ranks that hold other parts of the model that this rank trains.

    A job is a mesh of which ``process_group`` names the data-parallel axes, and this class the others::

        mesh = init_device_mesh("cuda", (2, 8, 4), mesh_dim_names=("pp", "dp", "tp"))
        ShardedLion(..., process_group=mesh["dp"], model_parallel=ModelParallel(tensor=mesh["tp"], pipeline=mesh["pp"]))

    Args:
        tensor: the ranks among which tensors are cut (tensor parallel), a 1-D DeviceMesh or a ProcessGroup. All of them
            have the same parameters, in the same order: cut ones, or equal copies.
        pipeline: the ranks that hold other layers (pipeline stages), with the same place along the other axes.
        expert: the ranks among which whole experts are divided, where experts are DTensors over them. Their param
            groups say by ``process_group`` which ranks share each part.
        cut_dim: of a plain tensor (name, parameter), the dimension along which the ranks of ``tensor`` cut it, in equal
            parts and in the order of ranks; None for one that each of them holds whole. A DTensor says so itself, and
            where there are DTensors, plain tensors are whole without this argument.
        tied: ``{label: name}`` of parameters that another stage holds too, by the name that they have on this stage.
            Stages give the same label to the same parameter: ``{"embedding": "head.weight"}`` on the last stage.
    """

    tensor: ProcessGroup | DeviceMesh | None = None
    pipeline: ProcessGroup | DeviceMesh | None = None
    expert: ProcessGroup | DeviceMesh | None = None
    cut_dim: CutDim | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name, where in (("tensor", self.tensor), ("pipeline", self.pipeline), ("expert", self.expert)):
            if where is None or isinstance(where, ProcessGroup):
                continue
            if not isinstance(where, DeviceMesh) or where.ndim != 1:
                found = f"a mesh of {where.ndim} axes" if isinstance(where, DeviceMesh) else values.shown(where)
                raise ValueError(
                    f"{name} must be a ProcessGroup that this rank belongs to, a 1-D DeviceMesh or None, got {found}. "
                    "Pass one axis of the mesh, such as mesh['tp']."
                )
        if self.cut_dim is not None and not callable(self.cut_dim):
            raise ValueError(
                f"cut_dim must be a function of (name, parameter) or None, got {values.shown(self.cut_dim)}. "
                "Megatron's parameters say it by lambda name, p: p.partition_dim if p.tensor_model_parallel else None."
            )
        tied = self.tied
        if not isinstance(tied, Mapping) or not all(isinstance(x, str) for pair in tied.items() for x in pair):
            raise ValueError(
                f"tied must be a dict of labels and names of parameters, got {values.shown(tied)}. For a head that "
                'shares the first stage\'s embedding: tied={"embedding": "head.weight"} on the last stage.'
            )
        if tied and self.pipeline is None:
            raise ValueError("tied names parameters that another pipeline stage holds too: pass pipeline as well")
