"""Parameter sync by gather and by codes, and DDP, over a slow link: time and bytes of whole steps, one run.

    sudo python -m lion_dist.benchmarks.param_sync --nodes --mbit 100 1000 --csv sync.csv   # two network namespaces
    sudo python -m lion_dist.benchmarks.param_sync --nodes --ranks-per-node 2               # two levels of links, too
    torchrun --nproc-per-node 2 -m lion_dist.benchmarks.param_sync                          # the links there are

With ``--nodes`` (root, iproute2) processes are on two nodes: namespaces joined by a veth pair whose ends ``tbf`` limits
to each rate in turn. Bytes are those that a node's interface counts (with TCP's own), or what ShardedLion handed to
collectives on this rank where there is no interface of its own. Engines take turns, so that other load meets them
alike; times are medians of the slowest rank. The losses of a gather and of codes must be the same bit for bit, or the
run fails; so must those of two levels, whose sum has another order.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lion_dist import Lion, ShardedLion, ShardingConfig, TwoLevels
from lion_dist.benchmarks.llama import Llama
from lion_dist.benchmarks.report import Rows
from lion_dist.sharding import collectives

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
INTERFACE = "GLOO_SOCKET_IFNAME"
NAMESPACES = ("lion-a", "lion-b")
DTYPES = {"bf16, split main params": torch.bfloat16, "fp32": torch.float32}

Step = Callable[[Tensor], Tensor]  # a batch -> its loss
Engine = tuple[Step, Callable[[], None]]  # what trains, and what waits for parameters on their way


def sharded(model: nn.Module, param_sync: str, process_group: DeviceMesh | TwoLevels | None = None) -> Engine:
    optimizer = ShardedLion(
        model.parameters(),
        **SETTINGS,
        module=model,
        process_group=process_group,
        sharding=ShardingConfig(param_sync=param_sync),
    )

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        return loss.detach()

    return step, optimizer.finish_param_sync


def ddp(model: nn.Module) -> Engine:
    wrapped, optimizer = DistributedDataParallel(model), Lion(model.parameters(), **SETTINGS)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = wrapped(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step, lambda: None


def engines(ranks_per_node: int, device: torch.device) -> dict[str, Callable[[nn.Module], Engine]]:
    found: dict[str, Callable[[Any], Engine]] = {
        "DDP + Lion": ddp,
        "ShardedLion, gather": lambda model: sharded(model, "gather"),
        "ShardedLion, coded": lambda model: sharded(model, "coded"),
    }
    if 1 < ranks_per_node < dist.get_world_size():
        shape = dist.get_world_size() // ranks_per_node, ranks_per_node
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("node", "local"))
        found |= {
            "ShardedLion, hybrid": lambda model: sharded(model, "gather", mesh),
            "ShardedLion, two levels, gather": lambda model: sharded(model, "gather", TwoLevels(mesh)),
            "ShardedLion, two levels, coded": lambda model: sharded(model, "coded", TwoLevels(mesh)),
        }
    return found


def sent_bytes() -> int:
    """By this process's network interface, where it has one; else by ShardedLion's collectives, which DDP's are not."""
    if INTERFACE not in os.environ:
        return collectives.sent_bytes
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == os.environ[INTERFACE]:
            return int(counters.split()[8])
    raise RuntimeError(f"no network interface {os.environ[INTERFACE]!r}, which {INTERFACE} names")


def measure(args, precision: str, device: torch.device) -> list[dict]:
    """One row an engine. Each trains a model of its own on the same batches."""
    steps: dict[str, Engine] = {}
    numel = 0
    for name, build in engines(args.ranks_per_node, device).items():
        torch.manual_seed(0)
        model = Llama(args.layers, args.dim, args.dim // 64, 64 * round(args.dim / 24), vocab=args.vocab)
        numel = sum(p.numel() for p in model.parameters())
        steps[name] = build(model.to(device, DTYPES[precision]))
    generator = torch.Generator().manual_seed(dist.get_rank())
    times, sent, losses = ({name: [] for name in steps} for _ in range(3))
    for i in range(args.warm_up + args.steps):
        batch = torch.randint(args.vocab, (args.micro_batch, args.seq_len + 1), generator=generator).to(device)
        for name, (step, finish) in steps.items():
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            for _ in range(args.burst):  # parameters are gathered while the next step's forward runs
                losses[name].append(step(batch))
            if device.type == "cuda":
                torch.cuda.synchronize()
            slowest = torch.tensor((time.perf_counter() - start) / args.burst, dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            finish()  # bytes of the last step that are on their way count here, and not in the next engine's
            dist.barrier()
            if i >= args.warm_up:
                times[name].append(1e3 * slowest.item())
                sent[name].append((sent_bytes() - before) / args.burst)
    for coded in (name for name in steps if name.endswith("coded")):
        gathered = coded.replace("coded", "gather")
        if not torch.equal(torch.stack(losses[coded]), torch.stack(losses[gathered])):
            raise RuntimeError(
                f"{precision}: the losses of a gather and of codes differ: {losses[gathered]} and {losses[coded]}"
            )
    return [
        {
            "mbit": args.link or "",
            "parameters": precision,
            "engine": name,
            "numel": numel,
            "ranks": dist.get_world_size(),
            "ms_median": round(statistics.median(times[name]), 1),
            "ms_min": round(min(times[name]), 1),
            "sent_bytes_per_param": round(statistics.median(sent[name]) / numel, 3) or "",
            "last_loss": losses[name][-1].item(),
        }
        for name in steps
    ]


def work(args) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rows = Rows(args.csv if dist.get_rank() == 0 else None, device)
    for row in (row for precision in DTYPES for row in measure(args, precision, device)):
        rows.add(row)
        if dist.get_rank() == 0:
            print(
                f"{row['mbit'] or '':>5} Mbit/s  {row['parameters']:25} {row['ms_median']:9.1f} ms a step  "
                f"{row['sent_bytes_per_param'] or '?':>6} bytes a parameter sent  {row['engine']}",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


# ---- two namespaces as two nodes


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[None]:
    """Namespaces 10.77.0.1 and 10.77.0.2, their interfaces named ``lion0``."""
    try:
        for namespace in NAMESPACES:
            run(f"ip netns add {namespace}")
        a, b = NAMESPACES
        run(f"ip link add lion0 netns {a} type veth peer name lion0 netns {b}")
        for i, namespace in enumerate(NAMESPACES):
            run(f"ip -n {namespace} addr add 10.77.0.{i + 1}/24 dev lion0")
            run(f"ip -n {namespace} link set lion0 up")
            run(f"ip -n {namespace} link set lo up")
        yield
    finally:
        for namespace in NAMESPACES:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def run_on_two_nodes(args) -> None:
    parts = []
    with two_nodes(), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for mbit in args.mbit:
            for namespace in NAMESPACES:
                limit = f"rate {mbit}mbit burst 256kb latency 50ms"
                run(f"ip netns exec {namespace} tc qdisc replace dev lion0 root tbf {limit}")
            parts.append(args.csv.with_suffix(f".{mbit}.csv") if args.csv else None)
            start_ranks(args, mbit, port, parts[-1])
    if args.csv:
        texts = [part.read_text().splitlines() for part in parts]
        args.csv.write_text("\n".join([texts[0][0], *(line for text in texts for line in text[1:])]) + "\n")
        for part in parts:
            part.unlink()


def start_ranks(args, mbit: int, port: int, csv: Path | None) -> None:
    """The first to fail ends the others."""
    kept = ("layers", "dim", "vocab", "seq_len", "micro_batch", "steps", "warm_up", "burst", "ranks_per_node")
    options = [text for name in kept for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    size = len(NAMESPACES) * args.ranks_per_node
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(port), INTERFACE: "lion0"}
    command = [sys.executable, "-m", "lion_dist.benchmarks.param_sync", *options, "--link", str(mbit)]
    command += ["--csv", str(csv)] if csv else []
    ranks = []
    for rank in range(size):
        namespace = NAMESPACES[rank // args.ranks_per_node]
        environment = os.environ | shared | {"RANK": str(rank)}
        ranks.append(subprocess.Popen(["ip", "netns", "exec", namespace, *command], env=environment))
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.2)
        if any(codes):
            raise SystemExit(f"a rank failed at {mbit} Mbit/s; its error is above")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--nodes", action="store_true", help="make two network namespaces, with ranks in each; needs root")
    add("--ranks-per-node", type=int, default=1, help="ranks that are neighbours; from 2 on, two levels are measured")
    add("--mbit", type=int, nargs="+", default=[100, 1000], help="rates of the link between them")
    add("--layers", type=int, default=4)
    add("--dim", type=int, default=256, help="a multiple of 64")
    add("--vocab", type=int, default=4096)
    add("--seq-len", type=int, default=32)
    add("--micro-batch", type=int, default=1, help="sequences a rank and step")
    add("--steps", type=int, default=7, help="measurements an engine")
    add("--warm-up", type=int, default=1)
    add("--burst", type=int, default=3, help="steps a measurement")
    add("--link", type=int, help="for the rows: the rate of the link that there is, in Mbit/s")
    add("--csv", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    run_on_two_nodes(args) if args.nodes else work(args)


if __name__ == "__main__":
    main()
