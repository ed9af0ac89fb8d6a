"""The flags of the training program, and what is checked before any rank waits for another."""

import argparse
import math
from pathlib import Path

import train
from comparison.deepspeed_engine import read_config
from comparison.engines import ENGINES
from lion_dist import ShardingConfig
from train import DTYPES, NODES

SHARDS_IN_REPLICAS = ("sharded", "fsdp2")  # the engines that --replicate is for
# Of flags that some engines have no use for: the engines that have, and the default.
FLAGS_OF_ENGINES = {
    "main_params": (tuple(name for name in ENGINES if name != "deepspeed"), "auto"),
    "zero_stage": (("sharded", "deepspeed"), 2),
    "param_sync": (("sharded",), "gather"),
    "deepspeed_config": (("deepspeed",), None),
}
# The smallest value of each number; none may be infinite.
AT_LEAST = {
    **dict.fromkeys("layers dim heads seq_len steps batch_size micro_batches log_every replicate timeout".split(), 1),
    **dict.fromkeys("lr weight_decay warmup clip seed checkpoint_every keep_last".split(), 0),
}


def parse_arguments(description: str) -> argparse.Namespace:
    """Raises ValueError for a flag that the chosen engine would ignore."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--engine", choices=list(ENGINES), default="sharded", help="how the ranks share the work")
    add("--data", help="a text file or a folder of them; None: the Python standard library's source")
    add("--out", type=Path, help="folder of metrics, loss curve and checkpoints; None: runs/ENGINE")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--dim", type=int, default=128, help="width of the model")
    add("--heads", type=int, default=4, help="attention heads")
    add("--seq-len", type=int, default=256, help="bytes per window")
    add("--steps", type=int, default=800, help="optimizer steps, and the length of the schedule")
    add("--batch-size", type=int, help="windows per step, over all ranks; None: 8, or more until it divides")
    add("--micro-batches", type=int, default=1, help="parts of a rank's batch, whose gradients add up")
    add("--lr", type=float, default=1e-3, help="learning rate at the end of the warmup")
    add("--weight-decay", type=float, default=0.1, help="of the matrices; multiplied by the learning rate")
    add("--warmup", type=int, default=20, help="steps of linear warmup; a cosine to a tenth of --lr follows")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--precision", choices=list(DTYPES), default="fp32", help="dtype of the parameters")
    add(
        "--main-params",
        choices=["auto", "fp32", "split", "none"],
        help="of bf16, with any engine but deepspeed; None: auto",
    )
    add("--momentum-dtype", choices=list(DTYPES), help="None: as the parameters")
    add("--zero-stage", type=int, help="1 or 2 of --engine sharded, 0 to 3 of --engine deepspeed; None: 2")
    add(
        "--param-sync",
        choices=["gather", "coded"],
        help="of --engine sharded: parameters, or update codes; None: gather",
    )
    add(
        "--replicate",
        type=_count_or_nodes,
        default=1,
        help="shard inside so many replicas and average across them: a number, or 'nodes' for one a node",
    )
    add("--deepspeed-config", help="of --engine deepspeed; None: launch/deepspeed/zeroN.json")
    add("--seed", type=int, default=0, help="of the initial weights and the batches")
    add("--checkpoint-every", type=int, default=0, help="steps; 0: only at the end, and when a signal asks")
    add("--keep-last", type=int, default=0, help="checkpoints to keep, older ones are removed; 0: all")
    add(
        "--resume",
        nargs="?",
        const="last",
        choices=["last", "auto"],
        help="go on from the newest whole checkpoint in --out; 'auto': or begin, where there is none",
    )
    add(
        "--log-every",
        type=int,
        default=5,
        help="steps between reads of the loss, which wait for the device; also how soon a signal is acted on",
    )
    add("--metrics-every", type=int, default=0, help="steps between the optimizer's metrics (docs/metrics.md); 0: none")
    add("--peak-tflops", type=float, help="of one device, for MFU; None: of known GPUs in bf16, else no MFU")
    add("--timeout", type=float, default=600, help="seconds that a rank waits for the others before it gives up")
    args = parser.parse_args()
    _fill_in_flags_of_engines(args)
    args.out = args.out or Path("runs") / args.engine
    if args.replicate == "nodes":
        args.replicate = NODES
    if args.batch_size is None:
        parts = train.WORLD_SIZE * max(1, args.micro_batches)
        args.batch_size = math.ceil(8 / parts) * parts
    return args


def _fill_in_flags_of_engines(args: argparse.Namespace) -> None:
    if args.deepspeed_config is not None and args.zero_stage is not None:
        raise ValueError(
            f"--zero-stage {args.zero_stage} chooses launch/deepspeed/zero{args.zero_stage}.json, but "
            f"--deepspeed-config {args.deepspeed_config} says its own stage. Leave one of the two out."
        )
    for name, (engines, default) in FLAGS_OF_ENGINES.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.engine not in engines:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)} is for --engine {' or '.join(engines)}, got "
                f"{args.engine}, which would ignore it. Leave it out, or choose another engine."
            )


def _count_or_nodes(text: str) -> int | str:
    return text if text == "nodes" else int(text)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError with the fact, the value and the remedy; the optimizer checks its own arguments."""
    if args.engine == "plain" and train.WORLD_SIZE > 1:
        raise ValueError(
            f"--engine plain trains in one process, but there are WORLD_SIZE={train.WORLD_SIZE}. "
            "Use --engine ddp or --engine sharded, or --nproc-per-node 1."
        )
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number of at least {least}, got {value}.")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise ValueError(f"--peak-tflops must be a finite number above 0, got {args.peak_tflops}.")
    if args.dim % (2 * args.heads):
        raise ValueError(f"--dim must be a multiple of 2 * --heads, got {args.dim} and {args.heads} heads.")
    if args.batch_size % (train.WORLD_SIZE * args.micro_batches):
        raise ValueError(
            f"--batch-size {args.batch_size} does not divide among {train.WORLD_SIZE} ranks x {args.micro_batches} "
            f"micro-batches. Use a multiple of {train.WORLD_SIZE * args.micro_batches}."
        )
    if args.metrics_every < 0 or (args.metrics_every and args.engine == "deepspeed"):
        raise ValueError(
            f"--metrics-every must be 0 with --engine deepspeed, which makes the optimizer by its JSON, and at least 0 "
            f"with others, got {args.metrics_every}."
        )
    if args.resume == "last" and ENGINES[args.engine].newest(args.out) is None:
        raise ValueError(
            f"--resume found no checkpoint in {args.out}. Pass the --out of an earlier run, or --resume auto to begin."
        )
    _check_sharding(args)


def _check_sharding(args: argparse.Namespace) -> None:
    if args.engine != "deepspeed":
        ShardingConfig(zero_stage=args.zero_stage)
    elif args.zero_stage not in range(4):
        raise ValueError(f"--zero-stage must be 0, 1, 2 or 3 with --engine deepspeed, got {args.zero_stage}.")
    else:
        read_config(args)
    if args.replicate == 1:
        return
    if args.engine not in SHARDS_IN_REPLICAS:
        raise ValueError(
            f"--replicate {args.replicate} is for --engine {' or '.join(SHARDS_IN_REPLICAS)}, got {args.engine}."
        )
    if train.WORLD_SIZE % args.replicate:
        raise ValueError(
            f"--replicate {args.replicate} does not divide {train.WORLD_SIZE} ranks. Start as many on every node, or "
            "pass a divisor."
        )
