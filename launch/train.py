"""Trains a byte-level language model with ShardedLion. One file to copy: put your own model and data into it.

    python launch/train.py                                                        # one process
    torchrun --nproc-per-node 8 launch/train.py --data my_texts/ --out runs/mine --resume auto

It uses GPUs and NCCL where there are GPUs, else CPUs and gloo. docs/launch.md explains many nodes, signals and lost
ranks. compare_engines.py, beside this file, runs the same training under DDP, FSDP and DeepSpeed.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lion_dist import CapturedStep, PrecisionPolicy, ShardedLion, ShardingConfig, checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# torchrun sets them: the number of ranks, that of nodes, and how often it may start the ranks again.
WORLD_SIZE, NODES = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE"))
MAX_RESTARTS = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def rotate(x: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim / 2]) of [batch, heads, seq_len, head_dim] by position."""
    seq_len, head_dim = x.shape[-2:]
    exponents = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
    angles = torch.arange(seq_len, device=x.device, dtype=torch.float32)[:, None] * 10_000.0**-exponents
    (first, second), cos, sin = x.float().chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Block(nn.Module):
    """Causal attention with rotary positions, then SwiGLU."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        hidden = 32 * math.ceil(8 * dim / 3 / 32)  # about as many weights as a plain MLP of 4 * dim
        self.heads, self.attention_norm, self.mlp_norm = heads, nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.attention_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_and_up, self.mlp_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq_len, dim = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, seq_len, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(batch, seq_len, dim))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * up)


class Transformer(nn.Module):
    """A token is a byte. forward(windows) takes uint8 [batch, seq_len + 1] and returns the mean loss in nats."""

    def __init__(self, layers: int, dim: int, heads: int):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(256, dim), nn.RMSNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, 256, bias=False)
        self.head.weight = self.embedding.weight
        for weight in [parameter for parameter in self.parameters() if parameter.dim() == 2]:
            nn.init.normal_(weight, std=0.02)
        for out in [out for block in self.blocks for out in (block.attention_out, block.mlp_out)]:
            nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * layers))  # 2 * layers add up in the residual stream

    def forward(self, windows: Tensor) -> Tensor:
        x = self.embedding(windows[:, :-1].long())
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), windows[:, 1:].long().flatten())


def read_corpus(data: str | None, seq_len: int) -> tuple[Tensor, Tensor]:
    """Text to train on, and held-out text (one file of 20): uint8 [bytes] of a file, a folder, or Python's library."""
    root, skipped = Path(data or Path(os.__file__).parent), set() if data else STDLIB_SKIPPED
    if not root.exists():
        raise ValueError(f"no such file or folder: {data}. Pass --data PATH with a text file or a folder.")
    found = [root] if root.is_file() else sorted(root.rglob("*" if data else "*.py"))
    names = {path: path.relative_to(root).parts for path in found if path.is_file()}
    paths = [path for path in names if not any(name.startswith(".") or name in skipped for name in names[path])]
    texts = [text for text in map(Path.read_bytes, paths) if text and b"\0" not in text[:8192]]  # no binary files
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // 20
        texts = [texts[0][:cut], texts[0][cut:]]
    held_out = texts[19::20] or texts[-1:]
    train = [text for i, text in enumerate(texts) if i % 20 != 19][: len(texts) - len(held_out)]
    joined = [bytearray(b"\0".join(part) + b"\0") for part in (train, held_out)]
    if min(sizes := [len(part) - 1 for part in joined]) <= seq_len:
        found = f"{sizes[0]} bytes to train on and {sizes[1]} held out (binary and empty files do not count)"
        raise ValueError(f"{root} has {found}, but one window is {seq_len + 1}. Pass more text to --data.")
    return tuple(torch.frombuffer(part, dtype=torch.uint8)[:-1] for part in joined)


def global_batch(text: Tensor, batch_size: int, seq_len: int, seed: int, step: int) -> Tensor:
    """The windows of one step, uint8 [batch_size, seq_len + 1]: on any number of ranks, and also when resumed."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)  # torch uses only 32 bits of it
    starts = torch.randint(text.numel() - seq_len, (batch_size,), generator=generator)
    return text[starts[:, None] + torch.arange(seq_len + 1)]


def start_process_group(timeout: timedelta) -> torch.device:
    """Meets the other processes that torchrun has started, if any. Returns this one's device."""
    if MAX_RESTARTS and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or restarted ranks look for dead ones")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    alone = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo" if device is None else "nccl", timeout=timeout, device_id=device, **alone)
    return device or torch.device("cpu")


def lr_factor(completed: int, warmup: int, steps: int) -> float:
    """Rises to 1 in `warmup` steps, then falls along a cosine to 0.1."""
    progress = min(1.0, (completed - warmup) / max(1, steps - warmup))
    return (completed + 1) / warmup if completed < warmup else 0.55 + 0.45 * math.cos(math.pi * progress)


class Training:
    """The model and its optimizer, and what a run does with them. Every rank calls every method."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        torch.manual_seed(args.seed)
        self.model = Transformer(args.layers, args.dim, args.heads).to(device, DTYPES[args.precision])
        matrices, gains = ([p for p in self.model.parameters() if (p.dim() == 2) == is_2d] for is_2d in (True, False))
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        sizes, axes = (args.replicate, WORLD_SIZE // args.replicate), ("replicate", "shard")
        mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=axes) if args.replicate > 1 else None
        lr = torch.tensor(args.lr, device=device) if args.cuda_graph else args.lr  # in a graph a float is a constant
        sharding, precision = ShardingConfig(zero_stage=args.zero_stage), PrecisionPolicy(seed=args.seed)
        self.optimizer = ShardedLion(  # with module=, updated parameters arrive while the next forward pass runs
            groups, lr=lr, module=self.model, process_group=mesh, sharding=sharding, precision=precision
        )
        self.train_step = CapturedStep(self.step, self.optimizer) if args.cuda_graph else self.step
        self.schedule = LambdaLR(self.optimizer, lambda completed: lr_factor(completed, args.warmup, args.steps))
        self.pending_save = self.wandb = None  # a checkpoint.PendingSave; a run of Weights & Biases, on the first rank
        self.signals: set[int] = set()  # that this process got; the ranks act on them together
        signal.signal(signal.SIGUSR1, lambda number, _frame: self.signals.add(number))

    def backward(self, windows: Tensor) -> Tensor:
        loss = self.model(windows)
        (loss / self.args.micro_batches).backward()  # gradients leave for their owners as they become ready
        return loss.detach()

    def step(self, windows: Tensor) -> Tensor:
        """Trains on this rank's windows. Returns its mean loss and the norm of the gradient, [2], without waiting."""
        *earlier, last = windows.chunk(self.args.micro_batches)
        with self.optimizer.no_sync():  # stage 1 adds up locally; stage 2 reduces every micro-batch
            losses = [self.backward(micro_batch) for micro_batch in earlier]
        losses.append(self.backward(last))
        # Not torch.nn.utils.clip_grad_norm_: the gradients are in shards.
        norm = self.optimizer.clip_grad_norm_(self.args.clip) if self.args.clip else self.optimizer.grad_norm()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([torch.stack(losses).mean(), norm.float()])

    def train(self, text: Tensor, step: int) -> int:
        """Trains from `step` completed steps to --steps, or until a SIGTERM. Returns the completed steps."""
        args, stop, unlogged, since = self.args, False, [], time.perf_counter()
        signal.signal(signal.SIGTERM, lambda number, _frame: self.signals.add(number))  # until now it ended the process
        while step < args.steps and not stop:
            step += 1
            batch = global_batch(text, args.batch_size, args.seq_len, args.seed, step)
            values = self.train_step(batch.chunk(WORLD_SIZE)[dist.get_rank()].to(self.device))
            unlogged.append((step, self.schedule.get_last_lr()[0], values.clone()))  # a graph writes into the same ones
            self.schedule.step()
            save = step == args.steps or (args.checkpoint_every > 0 and step % args.checkpoint_every == 0)
            if save or step % args.log_every == 0:
                asked, stop = self.log(unlogged, time.perf_counter() - since)
                save, unlogged, since = save or asked or stop, [], time.perf_counter()
            if save:
                self.save(step)
        self.finish_save()
        return step

    def log(self, steps: list[tuple], seconds: float) -> tuple[bool, bool]:
        """Appends steps to metrics.jsonl. Returns whether a signal asks any rank to save, and to save and stop."""
        asked = [float(number in self.signals) for number in (signal.SIGUSR1, signal.SIGTERM)]
        self.signals.discard(signal.SIGUSR1)
        mine = torch.stack([*(values for _, _, values in steps), torch.tensor(asked, device=self.device)])
        ranks = [torch.empty_like(mine) for _ in range(WORLD_SIZE)]
        dist.all_gather(ranks, mine)
        *means, asked = torch.stack(ranks).double().mean(dim=0).tolist()  # waits for the device
        tokens_per_s = round(self.args.batch_size * self.args.seq_len * len(steps) / seconds)
        if dist.get_rank() == 0:
            with (self.args.out / "metrics.jsonl").open("a") as file:
                for (step, lr, _), (loss, norm) in zip(steps, means, strict=True):
                    row = {"step": step, "loss": loss, "lr": float(lr), "grad_norm": norm, "tokens_per_s": tokens_per_s}
                    file.write(json.dumps(row) + "\n")
                    if self.wandb is not None:
                        self.wandb.log(row, step=step)
            if 10 * step // self.args.steps > 10 * (step - len(steps)) // self.args.steps:  # ten lines a run
                print(f"step {step}/{self.args.steps}  loss {loss:.4f}  {tokens_per_s:,} tokens/s", flush=True)
        return asked[0] > 0, asked[1] > 0

    @torch.no_grad()
    def held_out_loss(self, text: Tensor) -> float:
        """The mean over 128 evenly spaced windows."""
        starts = torch.linspace(0, len(text) - self.args.seq_len - 1, 128, dtype=torch.float64).long()
        windows = text[starts[:, None] + torch.arange(self.args.seq_len + 1)].to(self.device)
        return torch.stack([self.model(part) for part in windows.split(16)]).double().mean().item()

    def save(self, step: int) -> None:
        """Starts a checkpoint, which is written while training goes on."""
        self.finish_save()
        path, extra = self.args.out / f"step-{step:06d}", {"step": step, "scheduler": self.schedule.state_dict()}
        self.pending_save = checkpoint.save_async(path, model=self.model, optimizer=self.optimizer, extra=extra)

    def finish_save(self) -> None:
        if self.pending_save is not None:
            self.pending_save.wait()  # raises what went wrong
            if self.args.keep_last:
                checkpoint.keep_last(self.args.out, self.args.keep_last)

    def begin(self) -> int:
        """Loads the newest undamaged checkpoint in --out under --resume auto. Returns the number of completed steps."""
        out, extra = self.args.out, {"step": 0}
        found = checkpoint.newest(out, verified=True) if self.args.resume else None
        if found is not None:
            extra = checkpoint.load(found, model=self.model, optimizer=self.optimizer)
            self.schedule.load_state_dict(extra["scheduler"])
        if dist.get_rank() == 0:
            print(f"{extra['step']} steps are done in {out}; process {os.getpid()} takes signals", flush=True)
            out.mkdir(parents=True, exist_ok=True)
            metrics, new = out / "metrics.jsonl", out / "metrics.jsonl.tmp"
            if found is None and any(out.glob("step-*")):  # of an earlier run, with which this one must not be mixed
                aside = next(path for n in itertools.count(1) if not (path := out / f"earlier-{n}").exists())
                aside.mkdir()
                for path in [*out.glob("metrics.jsonl"), *out.glob("step-*")]:
                    path.rename(aside / path.name)
            rows = metrics.read_text().splitlines() if metrics.exists() else []  # there is one for each step
            new.write_text("".join(row + "\n" for row in rows[: extra["step"]]))
            new.replace(metrics)
            if project := self.args.wandb:
                self.wandb = importlib.import_module("wandb").init(project=project, dir=out, config=vars(self.args))
        dist.barrier()
        return extra["step"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="a text file or a folder of them; None: the Python standard library's source")
    add("--out", type=Path, default=Path("runs/sharded"), help="folder of metrics and checkpoints")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--dim", type=int, default=128, help="width of the model, a multiple of 2 * heads")
    add("--heads", type=int, default=4, help="attention heads")
    add("--seq-len", type=int, default=256, help="bytes per window")
    add("--steps", type=int, default=800, help="optimizer steps, and the length of the schedule")
    add("--batch-size", type=int, default=0, help="windows per step, over all ranks; 0: 8, or more until it divides")
    add("--micro-batches", type=int, default=1, help="parts of a rank's batch, whose gradients add up")
    add("--lr", type=float, default=1e-3, help="learning rate at the end of the warmup")
    add("--weight-decay", type=float, default=0.1, help="of the matrices; multiplied by the learning rate")
    add("--warmup", type=int, default=20, help="steps of linear warmup; a cosine to a tenth of --lr follows")
    add("--cuda-graph", action="store_true", help="whole steps as one CUDA graph: for small micro-batches, on GPUs")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--precision", choices=list(DTYPES), default="fp32", help="dtype of the parameters")
    add("--zero-stage", type=int, default=2, choices=(1, 2), help="1 keeps full gradients between micro-batches")
    add("--replicate", default="1", help="replicas of the state, each of neighbouring ranks; 'nodes': one a node")
    add("--seed", type=int, default=0, help="of the initial weights and the batches")
    add("--checkpoint-every", type=int, default=0, help="steps; 0: only at the end, and when a signal asks")
    add("--keep-last", type=int, default=0, help="checkpoints to keep; older ones are removed; 0: all")
    add("--resume", choices=["auto"], help="go on from the newest whole checkpoint in --out, or begin")
    add("--log-every", type=int, default=5, help="steps between exchanges of losses, when signals are acted on, too")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases, too; offline with WANDB_MODE=offline")
    add("--timeout", type=float, default=600, help="seconds that a rank waits for the others before it gives up")
    args = parser.parse_args()
    if args.wandb and importlib.util.find_spec("wandb") is None:
        parser.error("wandb is not installed, and --wandb needs it: pip install wandb")
    args.replicate = NODES if args.replicate == "nodes" else int(args.replicate)
    parts = WORLD_SIZE * args.micro_batches
    args.batch_size = args.batch_size or math.ceil(8 / parts) * parts
    if args.batch_size % parts or WORLD_SIZE % args.replicate:
        wanted = f"a multiple of {WORLD_SIZE} ranks x {args.micro_batches} micro-batches, got {args.batch_size}"
        parser.error(f"--batch-size must be {wanted}; and the ranks a multiple of --replicate, got {args.replicate}")
    return args


def main() -> int:
    args = parse_arguments()
    try:
        text, held_out_text = read_corpus(args.data, args.seq_len)
        training = Training(args, start_process_group(timedelta(seconds=args.timeout)))
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    begin, is_first = training.begin(), dist.get_rank() == 0
    before, end = training.held_out_loss(held_out_text), training.train(text, begin)
    if end < args.steps:
        if is_first:
            print(f"SIGTERM: {args.out}/step-{end:06d} holds {end} of {args.steps} steps; --resume auto continues it")
        time.sleep(2.0)  # launchers signal one rank after the other
        # A rank that only another's signal has stopped asks torchrun to start it again: 0 would end the whole job.
        return 75 if MAX_RESTARTS and signal.SIGTERM not in training.signals else 0
    after = training.held_out_loss(held_out_text)
    training.optimizer.check_replicas()  # raises ReplicaError where a rank holds other parameters than the others
    if is_first:
        numel = sum(parameter.numel() for parameter in training.model.parameters())
        sizes = [f"{kind} {size / numel:.2f}" for kind, size in training.optimizer.memory_bytes().items()]
        print(f"bytes per parameter on the first of {WORLD_SIZE} ranks: " + ", ".join(sizes))
        print(f"held-out loss, nats per byte: {before:.4f} after step {begin}, {after:.4f} after step {end}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
