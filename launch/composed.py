"""Trains train.py's model with tensor, pipeline or expert parallel beside ZeRO, by torch's own engines.

    torchrun --nproc-per-node 4 launch/composed.py --tensor-parallel 2       # data parallel 2 x tensor parallel 2
    torchrun --nproc-per-node 4 launch/composed.py --pipeline-parallel 2     # data parallel 2 x two stages
    torchrun --nproc-per-node 4 launch/composed.py --experts 4 --expert-parallel 2   # two of four experts on a rank

The ranks that are left are data-parallel. docs/composed.md explains what stands here; the checkpoint at the end is one
of the whole model, which train.py goes on from.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lion_dist import ModelParallel, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint
from lion_dist.integrations.pipelining import reduce_in_last_backward
from train import Transformer, global_batch, read_corpus, start_process_group

# Weights are cut, and every rank computes attention on whole activations: train.py's fused projections hold the three
# of a head far apart. A model whose heads lie one after another leaves out the layouts.
PLAN = {
    "blocks.*.qkv": ColwiseParallel(output_layouts=Replicate()),
    "blocks.*.attention_out": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.gate_and_up": ColwiseParallel(output_layouts=Replicate()),
    "blocks.*.mlp_out": RowwiseParallel(input_layouts=Replicate()),
}


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.long().flatten())


class Stage(nn.Module):
    """A pipeline stage of the model; its parameters have the names that they have in the whole model."""

    def __init__(self, whole: Transformer, number: int, stages: int):
        super().__init__()
        self.is_first, self.is_last, layers = number == 0, number == stages - 1, len(whole.blocks)
        own = range(layers * number // stages, layers * (number + 1) // stages)
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in own})
        if self.is_first:
            self.embedding = whole.embedding
        if self.is_last:
            self.norm, self.head = whole.norm, nn.Linear(*whole.head.weight.shape[::-1], bias=False)
            self.head.weight.data = whole.embedding.weight.detach().clone()  # tied: the first stage has it, too

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            x = self.embedding(x.long())
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if self.is_last else x


class Experts(nn.Module):
    """A mixture beside the MLP of a block: each token goes to one expert, on whichever rank of ``group`` that is.

    An expert has its own name (``blocks.0.experts.3.up.weight``), so checkpoints move between numbers of ranks.
    """

    def __init__(self, dim: int, count: int, group: dist.ProcessGroup):
        super().__init__()
        self.group, self.count, self.own = group, count, count // group.size()
        self.router = nn.Linear(dim, count, bias=False)
        for number in range(count):  # every rank makes all of them, and keeps its own
            expert = nn.Sequential(nn.Linear(dim, 2 * dim, bias=False), nn.SiLU(), nn.Linear(2 * dim, dim, bias=False))
            if number // self.own == group.rank():
                self.add_module(str(number), expert.to(self.router.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        share, chosen = self.router(tokens).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        leaving = chosen.bincount(minlength=self.count)
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving, group=self.group)
        leaving, coming = (counts.view(-1, self.own).tolist() for counts in (leaving, coming))
        rows = self._exchange(tokens[order], leaving, coming)
        parts = rows.split([count for of_rank in coming for count in of_rank])
        done = [self.get_submodule(str(self.group.rank() * self.own + i % self.own))(p) for i, p in enumerate(parts)]
        back = self._exchange(torch.cat(done), coming, leaving)
        return (torch.zeros_like(tokens).index_copy(0, order, back) * share[:, None]).view_as(x)

    def _exchange(self, rows: Tensor, leaving: list[list[int]], coming: list[list[int]]) -> Tensor:
        """``leaving``, ``coming``: rows to and from each rank, expert by expert."""
        sizes, wanted = list(map(sum, leaving)), list(map(sum, coming))
        return all_to_all_single(rows.new_empty(sum(wanted), rows.shape[1]), rows, wanted, sizes, self.group)


def add_experts(model: Transformer, dim: int, count: int, group: dist.ProcessGroup) -> list[nn.Parameter]:
    for block in model.blocks:
        block.experts = Experts(dim, count, group)
        block.register_forward_hook(lambda block, _, output: output + block.experts(block.mlp_norm(output)))
    return [p for name, p in model.named_parameters() if ".experts." in name and ".router." not in name]


class Job:
    """This rank's part of the model, its optimizer, and its steps."""

    def __init__(self, args: argparse.Namespace, device: torch.device, mesh: DeviceMesh):
        self.args, self.device, self.mesh, self.dp = args, device, mesh, mesh["edp", "ep"]._flatten("dp")
        torch.manual_seed(args.seed)  # every rank makes the whole model, and keeps its part
        model, stages = Transformer(args.layers, args.dim, args.heads).to(device), args.pipeline_parallel
        self.stage, tied = None, {}
        if stages > 1:
            model = Stage(model, mesh.get_local_rank("pp"), stages).to(device)
            names = [name for name, _ in model.named_parameters() if name in ("embedding.weight", "head.weight")]
            tied = dict(zip(["table"], names, strict=False))  # no stage in the middle has it
            self.tied = [model.get_parameter(name) for name in names]
            self.first_and_last = self._first_and_last()
        if args.tensor_parallel > 1:
            parallelize_module(model, mesh["tp"], PLAN)
        groups = []
        if args.experts:
            experts = add_experts(model, args.dim, args.experts, mesh["ep"].get_group())
            groups = [{"params": experts, "weight_decay": 0.1, "process_group": mesh["edp"]}]
        self.model, own = model.to(device), {p for group in groups for p in group["params"]}
        matrices, gains = ([p for p in model.parameters() if (p.dim() == 2) == is_2d] for is_2d in (True, False))
        groups += [{"params": [p for p in matrices if p not in own], "weight_decay": 0.1}]
        self.optimizer = ShardedLion(
            [*groups, {"params": gains, "weight_decay": 0.0}],
            lr=args.lr,
            module=model,
            process_group=self.dp,
            sharding=ShardingConfig(wait_in_backward=not args.experts),  # backward has collectives of its own then
            model_parallel=ModelParallel(tensor=mesh["tp"], pipeline=mesh["pp"], tied=tied),
            precision=PrecisionPolicy(seed=args.seed),
        )
        if stages > 1:
            number, group = mesh.get_local_rank("pp"), mesh["pp"].get_group()
            self.stage = PipelineStage(model, number, stages, device, group=group)
            self.schedule = Schedule1F1B(self.stage, args.micro_batches, loss_of, scale_grads=False)
            reduce_in_last_backward(self.optimizer, self.stage)

    def _first_and_last(self) -> dist.ProcessGroup | None:
        """The ranks that hold the embedding, with this rank's place along the other axes. All ranks make all groups."""
        own = None
        for ranks in self.mesh.mesh.flatten(1).t().tolist():  # the stages of each place
            group = dist.new_group([ranks[0], ranks[-1]])
            own = group if dist.get_rank() in (ranks[0], ranks[-1]) else own
        return own

    def step(self, windows: Tensor) -> Tensor | None:
        """One step. Returns the mean loss of this rank's windows, on the last stage."""
        self.optimizer.zero_grad()
        inputs, targets = windows[:, :-1], windows[:, 1:]
        losses: list[Tensor] = []
        if self.stage is None:
            for part in windows.chunk(self.args.micro_batches):
                losses.append(self.model(part))
                losses[-1].backward()
        else:
            wanted = {"target": targets, "losses": losses} if self.stage.is_last else {}
            self.schedule.step(*((inputs,) if self.stage.is_first else ()), **wanted)
            for weight in self.tied:  # a gradient for each use, of which both stages take the sum
                grad = self.optimizer.full_grad(weight)
                dist.all_reduce(grad, group=self.first_and_last)
                self.optimizer.set_full_grad(weight, grad)
        self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        return torch.stack([loss.detach() for loss in losses]).mean() if losses else None

    def train(self, text: Tensor) -> None:
        args, dp = self.args, self.dp
        speaks = self.mesh.get_local_rank("pp") == args.pipeline_parallel - 1 and not self.mesh.get_local_rank("tp")
        for step in range(1, args.steps + 1):
            batch = global_batch(text, args.batch_size, args.seq_len, args.seed, step)
            self.optimizer.set_grad_divisor(dp.size() * args.micro_batches)
            loss = self.step(batch.chunk(dp.size())[dp.get_local_rank()].to(self.device))
            if speaks and 10 * step // args.steps > 10 * (step - 1) // args.steps:  # ten lines a run
                dist.all_reduce(loss, group=dp.get_group())
                if dp.get_local_rank() == 0:
                    print(f"step {step}/{args.steps}  loss {loss.item() / dp.size():.4f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tensor-parallel", type=int, default=1, help="ranks that cut the weights of a block")
    add("--pipeline-parallel", type=int, default=1, help="ranks that each have a part of the blocks")
    add("--experts", type=int, default=0, help="experts beside the MLP of each block")
    add("--expert-parallel", type=int, default=1, help="data-parallel ranks that divide the experts")
    add("--micro-batches", type=int, default=2, help="parts of a rank's batch; for a pipeline at least its stages")
    add("--data", help="a text file or a folder of them; None: the Python standard library's source")
    add("--out", type=Path, default=Path("runs/composed"), help="the checkpoint goes into a folder step-... there")
    for name, value in (("layers", 4), ("dim", 128), ("heads", 4), ("seq-len", 256), ("steps", 200), ("seed", 0)):
        add(f"--{name}", type=int, default=value, help="as of train.py")
    add("--batch-size", type=int, default=16, help="windows per step, over all ranks")
    add("--lr", type=float, default=1e-3, help="learning rate, constant")
    args = parser.parse_args()
    ranks, parts = int(os.environ.get("WORLD_SIZE", 1)), args.tensor_parallel * args.pipeline_parallel
    if ranks % parts or args.batch_size % (ranks // parts * args.micro_batches):
        parser.error(
            f"{ranks} ranks must be a multiple of {args.tensor_parallel} x {args.pipeline_parallel}, and --batch-size "
            f"{args.batch_size} one of the data-parallel ranks x {args.micro_batches} micro-batches"
        )
    args.data_parallel = ranks // parts
    if args.data_parallel % args.expert_parallel or args.experts % args.expert_parallel or (args.experts and parts > 1):
        parser.error(
            f"--expert-parallel {args.expert_parallel} must divide the {args.data_parallel} data-parallel ranks and "
            f"--experts {args.experts}, and goes without tensor and pipeline parallel here"
        )
    return args


def main() -> None:
    args = parse_arguments()
    text, _ = read_corpus(args.data, args.seq_len)
    device = start_process_group(timedelta(minutes=10))
    data_parallel = args.data_parallel // args.expert_parallel, args.expert_parallel
    sizes = args.pipeline_parallel, *data_parallel, args.tensor_parallel
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "edp", "ep", "tp"))
    job = Job(args, device, mesh)
    job.train(text)
    path = args.out / f"step-{args.steps:06d}"
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, model=job.model, optimizer=job.optimizer, extra={"step": args.steps})
    if dist.get_rank() == 0:
        print(f"{path} holds the whole model of {sizes[0]} stages x {sizes[3]} tensor-parallel ranks", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
