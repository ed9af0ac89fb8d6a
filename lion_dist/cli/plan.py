"""``lion-dist plan``: what each engine would hold and send, before a job is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import textwrap

import torch

from lion_dist.cli.errors import UsageError
from lion_dist.planning.estimates import PRECISIONS, Job, activation_bytes
from lion_dist.planning.model_families import FAMILIES
from lion_dist.planning.model_shapes import PRESETS, read_shapes
from lion_dist.planning.parts import Axes, activation_traffic, heaviest_part, plan_composed
from lion_dist.reporting import aligned

GIB = 2**30
UNITS = {"": GIB, "GIB": GIB, "MIB": 2**20, "GB": 10**9, "MB": 10**6}
# A CUDA context, NCCL's own buffers, and what the caching allocator cannot use; of every GPU.
RESERVED = 2 * GIB
LARGEST = 1_000_000  # of any count
WIDTH = 120  # of what is printed
AVERAGES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_PRECISION = "bf16-split"
AXES = {
    "tensor": "ranks that cut each matrix, neighbours in a node",
    "pipeline": "stages of the model",
    "context": "ranks that share a sequence, of the data-parallel ones",
    "expert": "ranks that divide the experts, of the data-parallel ones",
}
HEADINGS = {
    "params": "params",
    "main_params": "main",
    "exp_avg": "momentum",
    "weight_avg": "average",
    "grads": "grads",
    "transient": "transient",
}


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "plan",
        help="bytes a rank, bytes sent a step, and what fits, for every engine and precision",
        description="Bytes a rank by kind for every engine, bytes sent a step, the time that takes, and what fits. "
        "Nothing is allocated and no process group is started.",
        epilog="Example: lion-dist plan --params 7b --ranks 64 --nodes 8 --gpu-mem 80GiB --micro-batch 1 "
        "--bandwidth 300/40",
    )
    add = parser.add_argument
    add("--params", required=True, metavar="SIZE|NAME|CONFIG.json",
        help=f"{', '.join(PRESETS)}; a number as 6.7e9; {', '.join(FAMILIES)}; or a Hugging Face config")  # fmt: skip
    add("--ranks", required=True, type=int, help="GPUs in all")
    add("--nodes", type=int, help="machines they are spread over; default: 8 ranks a node where that divides")
    for name, what in AXES.items():
        add(f"--{name}-parallel", type=int, default=1, metavar="RANKS", help=f"{what} (1)")
    add("--gpu-mem", type=_memory, metavar="80GiB", help="memory of one GPU; says what fits")
    add("--micro-batch", type=int, metavar="SEQUENCES", help="a rank's sequences in one pass; adds activations")
    add("--seq-len", type=int, default=4096, help="tokens a sequence (4096)")
    add("--accumulate", type=int, default=1, metavar="PASSES", help="micro-batches a step (1)")
    add("--checkpointing", action="store_true", help="activation checkpointing of every layer")
    add("--bandwidth", type=_bandwidths, metavar="INTRA/INTER", help="GB/s a rank inside a node and across nodes")
    add("--precision", choices=list(PRECISIONS), default=DEFAULT_PRECISION, metavar="NAME",
        help=f"of the detailed table: {'; '.join(PRECISIONS)} ({DEFAULT_PRECISION})")  # fmt: skip
    add("--average", choices=list(AVERAGES), help="an average of the weights (ema_decay) in this dtype")
    add("--json", action="store_true", help="everything, for every precision, as JSON")
    parser.set_defaults(run=run)


def _memory(text: str) -> int:
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 80GiB, 80GB or 80 (GiB)")
    if float(match[1]) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any GPU has; write 80GiB, 80GB or 80 (GiB)")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _bandwidths(text: str) -> tuple[float, float]:
    try:
        intra, inter = (float(part) * 1e9 for part in text.split("/"))
    except ValueError:
        intra = inter = 0.0
    if not (0 < intra < math.inf and 0 < inter < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers above 0, GB/s inside a node / across, as 300/40")
    return intra, inter


def run(args) -> int:
    for name, given in (("micro-batch", args.micro_batch), ("seq-len", args.seq_len)):
        if given is not None and given < 1:
            raise UsageError(f"--{name} must be at least 1, got {given}")
    numbers = {"micro-batch": args.micro_batch, "seq-len": args.seq_len, "accumulate": args.accumulate}
    numbers |= {f"{name}-parallel": getattr(args, f"{name}_parallel") for name in AXES}
    for name, given in (numbers | {"ranks": args.ranks, "nodes": args.nodes}).items():
        if given is not None and given > LARGEST:
            raise UsageError(f"--{name} is more than any job has (at most {LARGEST}). Pass a smaller number.")
    nodes = args.nodes
    if nodes is None:
        nodes = args.ranks // 8 if args.ranks > 8 and args.ranks % 8 == 0 else 1
    try:
        job = Job(args.ranks, nodes, args.accumulate)
        axes = Axes(*(getattr(args, f"{name}_parallel") for name in AXES))
        model = read_shapes(args.params)
        part = model if axes.is_one else heaviest_part(model, axes.tensor, axes.pipeline)
        average = AVERAGES.get(args.average)
        plans = {precision: plan_composed(model, job, axes, precision, average) for precision in PRECISIONS}
    except ValueError as error:
        raise UsageError(str(error)) from error
    rows = {precision: [_row(p, part, job, axes, args) for p in found] for precision, found in plans.items()}
    if args.json:
        print(json.dumps({"model": _model(model), "job": _job(job, args), "plans": sum(rows.values(), [])}, indent=2))
        return 0
    print(f"{model.name}: {model.numel / 1e9:.2f} B parameters in {len(model.params)} tensors ({model.source})")
    print(_job_line(job, args))
    detailed = _with_adamw(rows, args.precision)
    print(f"\n{args.precision}, GiB a rank\n" + _detailed_table(detailed, args))
    print("\nall precisions, GiB a rank in total\n" + _totals_table(rows, args))
    print("\n" + _notes(args))
    return 0


def _row(found, part, job, axes, args) -> dict:
    row = {"engine": found.engine, "precision": found.precision, "bytes": dict(found.memory)}
    if args.micro_batch is not None:
        tokens = -(-args.micro_batch * args.seq_len // axes.context)
        kept = activation_bytes(part, tokens, found.compute_bytes, checkpointing=args.checkpointing)
        in_flight = min(axes.pipeline, job.micro_batches)  # on the first stage, under 1F1B
        row["bytes"]["activations"] = in_flight * kept // axes.tensor
        sent = activation_traffic(part, job, axes, tokens, found.compute_bytes)
        found = dataclasses.replace(found, traffic=found.traffic + sent)
    row["total_bytes"] = sum(row["bytes"].values())
    if args.gpu_mem is not None:
        row["fits"] = row["total_bytes"] + RESERVED <= args.gpu_mem
    row["sent_bytes_per_step"] = {c.what: c.sent for c in found.traffic}
    if args.bandwidth is not None:
        row["communication_seconds_per_step"] = found.seconds(*args.bandwidth)
    return row


def _model(model) -> dict:
    return {"name": model.name, "source": model.source, "numel": model.numel, "tensors": len(model.params)}


def _job(job, args) -> dict:
    asked = ("gpu_mem", "micro_batch", "seq_len", "checkpointing", "bandwidth")
    found = {"ranks": job.ranks, "nodes": job.nodes, "micro_batches": job.micro_batches}
    return found | {name: getattr(args, name) for name in (*asked, *(f"{axis}_parallel" for axis in AXES))}


def _job_line(job, args) -> str:
    parts = [f"{job.ranks} ranks"]
    if job.nodes > 1:
        parts = [f"{job.ranks} ranks on {job.nodes} nodes of {job.ranks_per_node}"]
    for name in AXES:
        if getattr(args, f"{name}_parallel") > 1:
            parts.append(f"{getattr(args, f'{name}_parallel')} {name}-parallel")
    if args.gpu_mem is not None:
        parts.append(f"{args.gpu_mem / GIB:.0f} GiB each")
    if args.micro_batch is not None:
        kept = ", activation checkpointing" if args.checkpointing else ""
        parts.append(f"micro-batch {args.micro_batch} x {args.seq_len} tokens{kept}")
    if job.micro_batches > 1:
        parts.append(f"{job.micro_batches} micro-batches a step")
    if args.bandwidth is not None:
        intra, inter = (value / 1e9 for value in args.bandwidth)
        parts.append(f"{intra:g} GB/s inside a node, {inter:g} across")
    return textwrap.fill(", ".join(parts), WIDTH)


def _with_adamw(rows: dict[str, list[dict]], precision: str) -> list[dict]:
    """The rows of one precision, and AdamW's over fp32 parameters, to compare with, where it has no row of its own."""
    found = rows[precision]
    if any("AdamW" in row["engine"] for row in found):
        return found
    others = [row for row in rows["fp32"] if "AdamW" in row["engine"]]
    return found + [row if "compute" in row["engine"] else row | {"engine": f"{row['engine']}, fp32"} for row in others]


def _detailed_table(rows: list[dict], args) -> str:
    kinds = list(rows[0]["bytes"])
    columns = ["", *(HEADINGS.get(kind, kind) for kind in kinds), "total"]
    columns += ["fits"] * (args.gpu_mem is not None) + ["GiB sent"] + ["seconds"] * (args.bandwidth is not None)
    table = [columns]
    for row in rows:
        cells = [row["engine"], *(_gib(row["bytes"].get(kind, 0)) for kind in kinds), _gib(row["total_bytes"])]
        if args.gpu_mem is not None:
            cells.append("yes" if row["fits"] else "no")
        cells.append(_gib(sum(row["sent_bytes_per_step"].values())))
        if args.bandwidth is not None:
            cells.append(f"{row['communication_seconds_per_step']:.3f}")
        table.append(cells)
    return aligned(table)


def _totals_table(rows: dict[str, list[dict]], args) -> str:
    engines = [row["engine"] for row in max(rows.values(), key=len)]  # fp32 goes with every engine
    by_engine = {p: {row["engine"]: row for row in found} for p, found in rows.items()}
    chosen = [PRECISIONS[name] for name in rows]
    table = [
        ["parameters", *(_short(p.param_dtype) for p in chosen)],
        ["main params", *(p.policy.main_params_for(p.param_dtype) for p in chosen)],
        ["momentum", *(_short(p.policy.momentum_dtype_for(p.param_dtype)) for p in chosen)],
    ]
    for engine in engines:
        cells = [by_engine[p].get(engine) for p in rows]
        table.append([engine, *("-" if c is None else _gib(c["total_bytes"]) + _mark(c) for c in cells)])
    return aligned(table)


def _short(dtype) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16"}[str(dtype)]


def _mark(row: dict) -> str:
    return "" if row.get("fits", True) else "!"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"


def _notes(args) -> str:
    notes = [
        "transient: gradients not yet packed, layers that FSDP2 has gathered, DeepSpeed's buckets; an estimate.",
        "GiB sent: by each rank in one step, forward to step, padding included.",
        "DDP: buckets stand beside the gradients unless gradient_as_bucket_view=True (bucket view). ZeRO-1: torch's.",
        "AdamW: torch's, both moments in the parameters' dtype (under momentum), no main params.",
        "-: DeepSpeed keeps fp32 main params for bf16 parameters, whatever the optimizer would do without; AdamW none.",
    ]
    if args.gpu_mem is not None:
        notes.append(f"! does not fit: more than --gpu-mem less {RESERVED // GIB} GiB for CUDA, NCCL, fragmentation.")
    if args.micro_batch is None:
        notes.append("No activations are counted: pass --micro-batch.")
    else:
        notes.append("activations: 17 hidden-sized values a token and layer, and the logits; an estimate.")
    if any(getattr(args, f"{name}_parallel") > 1 for name in AXES):
        notes += [
            "composed: of the rank with the largest part of the model; activations as of 1F1B and sequence parallel.",
            "GiB sent: with --micro-batch, tensor and pipeline parallel included; not context and expert parallel.",
        ]
    if args.bandwidth is not None:
        notes.append("seconds: bytes / bandwidth, of the slower link where a group spans nodes; no latency or overlap.")
    return "\n".join(notes)
