"""The optimizer step alone: this library and every other Lion that is installed, against the copy ceiling.

    python -m lion_dist.benchmarks.update                  # one GPU, under 4 minutes; nothing is installed by it
    python -m lion_dist.benchmarks.update --device cpu     # the CPU path against lion-pytorch's
    python -m lion_dist.benchmarks.update --sweep          # launch shapes of the Triton kernel

GB/s counts the bytes that must move: what a step reads and writes of parameters, state and gradients, once each.
The ceiling is a device-to-device copy, bytes read plus bytes written. Tensors hold random numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lion_dist import Lion, PrecisionPolicy, SpikeGuard
from lion_dist.benchmarks.report import Rows, version_of
from lion_dist.benchmarks.timing import (
    Timing,
    free_gpu_memory,
    host_time_of_moving_gradients,
    time_in_graph,
    time_on_cpu,
    time_on_gpu,
)
from lion_dist.kernels.backends import choose_backend
from lion_dist.kernels.reference import StepScalars, lion_step
from lion_dist.kernels.update import LionTensors, lion_update_
from lion_dist.main_params import init_main_param
from lion_dist.reporting import aligned, figure_into

LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.99), 0.1
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


# ---------------------------------------------------------------------------------------------------------------
# Parameter shapes.


def llama_shapes() -> list[tuple[int, ...]]:
    """147 tensors of 1.35 B parameters: 24 layers of width 2048, an untied embedding and head of 32,000 tokens."""
    d, ffn, vocab = 2048, 5504, 32_000
    layer = [(d,), (3 * d, d), (d, d), (d,), (2 * ffn, d), (d, ffn)]
    return [(vocab, d), *(24 * layer), (d,), (vocab, d)]


def small_shapes() -> list[tuple[int, ...]]:
    """4,000 tensors of 67 M parameters: biases, norms and low-rank adapters, some with odd sizes."""
    shapes: list[tuple[int, ...]] = [(16, 2048), (2048, 16), (1024,), (771,)]
    return 1000 * shapes


MODELS = {"llama 1.35B": llama_shapes, "4000 small": small_shapes, "4 MiB shard": lambda: [(2**21,)]}


# ---------------------------------------------------------------------------------------------------------------
# Providers: each makes a step() over parameters that have gradients.


@dataclass(frozen=True)
class Provider:
    name: str
    precision: str
    dtype: torch.dtype  # of parameters and gradients
    bytes_per_param: int  # that a step must move
    build: Callable[[list[nn.Parameter]], Callable[[], None]]
    flat: bool = False  # one flat shard of the same numel, instead of separate tensors
    distribution: str = "lion-dist"


PRECISIONS = {
    "fp32": (FP32, PrecisionPolicy()),
    "fp32, bf16 momentum": (FP32, PrecisionPolicy(momentum_dtype=BF16)),
    "bf16 + fp32 main": (BF16, PrecisionPolicy(main_params="fp32")),
    "bf16 split": (BF16, PrecisionPolicy(main_params="split")),
    "bf16 split, stochastic momentum": (BF16, PrecisionPolicy(momentum_rounding="stochastic")),
    "bf16 none": (BF16, PrecisionPolicy(main_params="none")),
    "bf16 none, stochastic momentum": (BF16, PrecisionPolicy(main_params="none", momentum_rounding="stochastic")),
    "fp16 + fp32 main": (FP16, PrecisionPolicy()),
}


def bytes_per_param(dtype: torch.dtype, policy: PrecisionPolicy) -> int:
    """Gradient read; momentum read and written; the parameter likewise, unless fp32 main params are read instead."""
    size, momentum = dtype.itemsize, policy.momentum_dtype_for(dtype).itemsize
    params = {"own": 2 * size, "none": 2 * size, "split": 2 * size + 4, "fp32": size + 8}
    return size + 2 * momentum + params[policy.main_params_for(dtype)]


def flat_tensors(param: Tensor, policy: PrecisionPolicy) -> LionTensors:
    """The tensors that a bucket of ShardedLion updates."""
    main = init_main_param(param, policy.main_params_for(param.dtype))
    return LionTensors(
        params=[param],
        exp_avgs=[torch.zeros_like(param, dtype=policy.momentum_dtype_for(param.dtype))],
        mains=None if main is None else [main],
        index_starts=[0],
        steps=torch.zeros(1, dtype=torch.int64, device=param.device),
        stochastic_momentum=policy.momentum_rounding == "stochastic",
    )


def flat_step(params: list[nn.Parameter], policy: PrecisionPolicy) -> Callable[[], None]:
    (param,) = params
    tensors, backend = flat_tensors(param.detach(), policy), choose_backend(param.device, None)
    scalars = StepScalars.from_group(LR, BETAS, WEIGHT_DECAY)
    return lambda: lion_update_(tensors, [param.grad], scalars, backend=backend)


def compiled_reference_step(params: list[nn.Parameter], policy: PrecisionPolicy) -> Callable[[], None]:
    """torch.compile of the reference implementation, for precisions that need no random bits."""
    (param,) = params
    tensors = flat_tensors(param.detach(), policy)
    main_param = None if tensors.mains is None else tensors.mains[0]
    scalars = StepScalars.from_group(LR, BETAS, WEIGHT_DECAY)

    @torch.compile
    def step_(param, main, exp_avg, grad):
        for old, new in zip((param, main, exp_avg), lion_step(param, main, exp_avg, grad, scalars), strict=True):
            if old is not None:
                old.copy_(new)

    return torch.no_grad()(lambda: step_(tensors.params[0], main_param, tensors.exp_avgs[0], param.grad))


def optimizer_step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
    return lambda params: make(params).step


def lion_pytorch_step(params, variant: str) -> Callable[[], None]:
    if variant == "foreach":
        from lion_pytorch.foreach import Lion as Peer

        return Peer(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY).step
    if variant == "cautious":
        from lion_pytorch.cautious_lion import Lion as Peer

        return Peer(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY).step
    from lion_pytorch import Lion as Peer

    return Peer(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, use_triton=variant == "triton").step


def adamw_step(params) -> Callable[[], None]:
    """torch's fused AdamW, with its own betas: what people compare with. Its two moments have the parameters' dtype."""
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True).step


def optimi_step(params, kahan_sum: bool) -> Callable[[], None]:
    from optimi import Lion as Peer

    return Peer(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, kahan_sum=kahan_sum, triton=True).step


def flash_step(params, **options) -> Callable[[], None]:
    from flashoptim import FlashLion as Peer

    return Peer(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, **options).step


def deepspeed_step(params) -> Callable[[], None]:
    from deepspeed.ops.lion import FusedLion as Peer

    return Peer(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY).step


# What a step may do beyond the plain one, and whether it reads gradient and momentum once more. Each is measured beside
# the plain step of its precision; ``report_rules`` prints the ratios.
RULES = {
    "cautious": ({"cautious": True}, True),
    "cautious decay": ({"cautious_wd": True}, False),
    "corrected decay": ({"corrected_weight_decay": True}, False),
    "maximize": ({"maximize": True}, False),
    "spike guard": ({"skip_spikes": SpikeGuard()}, False),  # of a norm that is there already, as ShardedLion's is
    "cautious, both decays": ({"cautious": True, "cautious_wd": True, "corrected_weight_decay": True}, True),
    "fp32 average": ({"ema_decay": 0.999}, False),
    "bf16 average": ({"ema_decay": 0.999}, False),
}
AVERAGES = {"fp32 average": FP32, "bf16 average": BF16}  # read and written
ALSO_FLAT = ("cautious", "bf16 average")
RULED_PRECISIONS = ("fp32", "bf16 split", "bf16 none")


def ruled_step(params: list[nn.Parameter], policy: PrecisionPolicy, rule: str) -> Callable[[], object]:
    policy = replace(policy, ema_dtype=AVERAGES.get(rule))
    opt = Lion(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, precision=policy, **RULES[rule][0])
    if opt.skip_spikes is None:
        return opt.step
    norm = torch.ones((), device=params[0].device)

    def guarded_step() -> None:
        opt.observe(grad_norm=norm)
        opt.step()

    return guarded_step


def ruled_providers(precision: str) -> list[Provider]:
    """``Lion`` with each rule, over the list and (some) over one tensor of the same numel."""
    dtype, policy = PRECISIONS[precision]
    result = []
    for rule, (_, counts) in RULES.items():
        moved = bytes_per_param(dtype, policy) + counts * (dtype.itemsize + policy.momentum_dtype_for(dtype).itemsize)
        moved += 2 * AVERAGES[rule].itemsize if rule in AVERAGES else 0
        build = lambda params, rule=rule: ruled_step(params, policy, rule)  # noqa: E731
        result.append(Provider(f"lion_dist list, {rule}", precision, dtype, moved, build))
        if rule in ALSO_FLAT:
            result.append(Provider(f"lion_dist flat, {rule}", precision, dtype, moved, build, flat=True))
    return result


def report_rules(rows: list[dict]) -> None:
    """The time of every rule as a multiple of the plain step's, of one run, model and precision."""
    plain = {(r["model"], r["provider"], r["precision"], r["mode"]): r["ms_median"] for r in rows}
    for r in rows:
        name, _, rule = r["provider"].partition(", ")
        base = plain.get((r["model"], name, r["precision"], r["mode"]))
        if rule in RULES and base:
            print(f"{r['model']}, {r['precision']}, {r['mode']}: {name}, {rule}: {r['ms_median'] / base:.2f} x plain")


def own_providers() -> list[Provider]:
    result = []
    for precision, (dtype, policy) in PRECISIONS.items():
        moved = bytes_per_param(dtype, policy)
        make = optimizer_step(
            lambda params, policy=policy: Lion(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, precision=policy)
        )
        flat = lambda params, policy=policy: flat_step(params, policy)  # noqa: E731
        result.append(Provider("lion_dist flat", precision, dtype, moved, flat, flat=True))
        result.append(Provider("lion_dist list", precision, dtype, moved, make))
        if precision in RULED_PRECISIONS:
            result += ruled_providers(precision)
    for precision in ("fp32", "bf16 split"):
        dtype, policy = PRECISIONS[precision]
        build = lambda params, policy=policy: compiled_reference_step(params, policy)  # noqa: E731
        moved = bytes_per_param(dtype, policy)
        result.append(Provider("torch.compile", precision, dtype, moved, build, flat=True, distribution="torch"))
    return result


def peer_providers() -> list[Provider]:
    def peer(name, distribution, precision, dtype, moved, build, **options):
        make = lambda params: build(params, **options)  # noqa: E731
        return Provider(name, precision, dtype, moved, make, distribution=distribution)

    pytorch, deepspeed = "lion-pytorch", "deepspeed"
    int8 = {"quantize": True, "master_weight_bits": 24}
    return [
        peer("torch AdamW fused", "torch", "bf16", BF16, 14, adamw_step),
        peer("torch AdamW fused", "torch", "fp32", FP32, 28, adamw_step),
        peer("lion-pytorch plain", pytorch, "bf16", BF16, 10, lion_pytorch_step, variant="plain"),
        peer("lion-pytorch foreach", pytorch, "bf16", BF16, 10, lion_pytorch_step, variant="foreach"),
        peer("lion-pytorch triton", pytorch, "bf16", BF16, 10, lion_pytorch_step, variant="triton"),
        peer("lion-pytorch triton", pytorch, "fp32", FP32, 20, lion_pytorch_step, variant="triton"),
        peer("lion-pytorch cautious", pytorch, "bf16", BF16, 14, lion_pytorch_step, variant="cautious"),
        peer("optimi triton", "torch-optimi", "bf16", BF16, 10, optimi_step, kahan_sum=False),
        peer("optimi triton", "torch-optimi", "bf16, Kahan", BF16, 14, optimi_step, kahan_sum=True),
        peer("FlashLion", "flashoptim", "bf16 split", BF16, 14, flash_step, quantize=False, master_weight_bits=32),
        peer("FlashLion", "flashoptim", "bf16 24-bit, int8 momentum", BF16, 10, flash_step, **int8),
        peer("DeepSpeed FusedLion", deepspeed, "bf16", BF16, 10, deepspeed_step),
        peer("DeepSpeed FusedLion", deepspeed, "fp32", FP32, 20, deepspeed_step),
    ]


# ---------------------------------------------------------------------------------------------------------------
# Rows.


def make_params(shapes, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def row(model: str, provider: str, precision: str, mode: str, tensors: int, bytes_moved: int, timing: Timing) -> dict:
    extra = timing.extra_peak_bytes
    return {
        "model": model,
        "provider": provider,
        "precision": precision,
        "mode": mode,
        "tensors": tensors,
        "bytes_moved": bytes_moved,
        "ms_median": round(timing.median, 4),
        "ms_p10": round(timing.p10, 4),
        "ms_p90": round(timing.p90, 4),
        "repeats": timing.repeats,
        "gb_per_s": round(bytes_moved / timing.median / 1e6, 1),
        "percent_of_copy": None,
        "host_ms": None if timing.host is None else round(timing.host, 4),
        "host_ms_moved": None if timing.host_moved is None else round(timing.host_moved, 4),
        "extra_peak_mib": None if extra is None else round(extra / 2**20, 3),
        "version": None,
    }


def copy_row(model: str, bytes_moved: int, device: torch.device, repeats: int, timer=time_on_gpu, mode="") -> dict:
    source = torch.randn(bytes_moved // 8, device=device)
    target = torch.empty_like(source)
    return row(model, "copy", "", mode, 1, bytes_moved, timer(lambda: target.copy_(source), repeats))


def measure_model(model: str, providers: list[Provider], device: torch.device, repeats: int, ceiling: float):
    """Yield a row for each provider that is installed and runs; of the small tensors, only as separate tensors."""
    shapes = MODELS[model]()
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    for provider in providers:
        if provider.flat and model == "4000 small":
            continue
        params = make_params([(numel,)] if provider.flat else shapes, provider.dtype, device)
        step = None
        try:
            step = provider.build(params)
            timing = time_on_gpu(step, repeats)
            if provider.name == "lion_dist list":
                timing = replace(timing, host_moved=host_time_of_moving_gradients(step, params))
        except Exception as error:  # a peer's trouble must not end the run; our own must
            if provider.distribution == "lion-dist":
                raise
            reason = "not installed" if isinstance(error, ImportError) else "failed"
            print(f"{model:<12}{provider.name}: {provider.precision}: {reason} ({error!r:.200})", flush=True)
            del params, step
            continue
        moved = numel * provider.bytes_per_param
        result = row(model, provider.name, provider.precision, "eager", len(params), moved, timing)
        result["percent_of_copy"] = round(100 * result["gb_per_s"] / ceiling, 1)
        result["version"] = version_of(provider.distribution)
        yield result
        del params, step
        free_gpu_memory()


def measure_shard(providers: list[Provider], device: torch.device, repeats: int):
    """Yield rows of a 4 MiB bf16 shard, launched eagerly and within a CUDA graph, beside their floors.

    The floors: one kernel over a single element, and a copy of as many bytes. The shard stays in the L2 cache.
    """
    model = "4 MiB shard"
    (shape,) = MODELS[model]()
    one = torch.zeros(1, device=device)
    for mode, timer in (("eager", time_on_gpu), ("graph", time_in_graph)):
        yield row(model, "one-element kernel", "", mode, 1, 8, timer(lambda: one.add_(1), repeats))
        for provider in providers:
            if not (provider.name == "lion_dist flat" and provider.dtype == BF16):
                continue
            moved = shape[0] * provider.bytes_per_param
            ceiling = copy_row(model, moved, device, repeats, timer, mode)
            ceiling["precision"] = provider.precision
            yield ceiling
            for numel in (1, shape[0]):
                params = make_params([(numel,)], BF16, device)
                timing = timer(provider.build(params), repeats)
                name = provider.name if numel > 1 else f"{provider.name}, one element"
                result = row(model, name, provider.precision, mode, 1, numel * provider.bytes_per_param, timing)
                if numel > 1:
                    result["percent_of_copy"] = round(100 * ceiling["ms_median"] / timing.median, 1)
                result["version"] = version_of(provider.distribution)
                yield result


# ---------------------------------------------------------------------------------------------------------------
# The runs.

# Of each column: the heading, the least width, the key in a row and the digits behind the point (None: text).
COLUMNS = (
    ("model", 11, "model", None),
    ("provider", 37, "provider", None),
    ("precision", 32, "precision", None),
    ("mode", 5, "mode", None),
    ("ms", 8, "ms_median", 4),
    ("p10", 8, "ms_p10", 4),
    ("p90", 8, "ms_p90", 4),
    ("GB/s", 6, "gb_per_s", 0),
    ("% copy", 6, "percent_of_copy", 1),
    ("host ms", 7, "host_ms", 3),
    ("moved", 6, "host_ms_moved", 3),
    ("extra MiB", 9, "extra_peak_mib", 3),
)
HEADINGS = [heading for heading, *_ in COLUMNS]


def line(cells: Sequence[object]) -> str:
    return aligned([cells], [width for _, width, *_ in COLUMNS], text_columns=4)


HEADER = line(HEADINGS)


def show(result: dict) -> None:
    values = [(result[key], digits) for *_, key, digits in COLUMNS]
    cells = [value if digits is None or value is None else f"{value:.{digits}f}" for value, digits in values]
    print(line(cells), flush=True)


def run_on_gpu(args, device: torch.device) -> Iterator[dict]:
    providers = [p for p in own_providers() + peer_providers() if args.providers in f"{p.name} {p.precision}"]
    ceiling = copy_row("ceiling", 2**33, device, args.repeats, mode="eager")
    yield ceiling
    free_gpu_memory()
    for model in args.models:
        if model == "4 MiB shard":
            yield from measure_shard(providers, device, args.repeats)
        else:
            yield from measure_model(model, providers, device, args.repeats, ceiling["gb_per_s"])


def run_on_cpu(args, device: torch.device) -> Iterator[dict]:
    """The CPU path at ``--numel`` parameters: fp32 against lion-pytorch's plain and foreach steps and torch's AdamW,
    and every rule against the plain step of its precision."""
    peers = ("plain", "foreach", "cautious") if version_of("lion-pytorch") else ()
    for precision in RULED_PRECISIONS:
        dtype, policy = PRECISIONS[precision]
        providers = [p for p in own_providers() if p.name.startswith("lion_dist list") and p.precision == precision]
        moved = {p.name: p.bytes_per_param for p in providers}
        makers = {p.name: p.build for p in providers}
        for variant in peers if dtype == FP32 else ():
            moved[f"lion-pytorch {variant}"] = 20
            makers[f"lion-pytorch {variant}"] = lambda params, v=variant: lion_pytorch_step(params, v)
        if dtype == FP32:
            moved["torch AdamW fused"], makers["torch AdamW fused"] = 28, adamw_step
        makers = {name: make for name, make in makers.items() if args.providers in f"{name} {precision}"}
        steps = {name: make(make_params([(args.numel,)], dtype, device)) for name, make in makers.items()}
        for name, timing in time_on_cpu(steps, args.repeats).items():
            numel = args.numel
            result = row(f"{numel / 1e6:.0f} M", name, precision, "eager", 1, moved[name] * numel, timing)
            distribution = {"lion_dist": "lion-dist", "torch": "torch"}.get(name.split()[0], "lion-pytorch")
            yield result | {"version": version_of(distribution)}


def sweep(device: torch.device, repeats: int, wanted: str, numel: int = 2**29) -> None:
    """Launch shapes of the flat kernel, GB/s of each provider whose name and precision contain ``wanted``."""
    from lion_dist.triton_backend.launch import LAUNCH_SHAPES, LaunchShape

    shapes = [(512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)]
    candidates = [LaunchShape(block, warps, vector) for vector in (4, 8) for block, warps in shapes]
    widths = [64, *[8] * len(candidates)]
    headings = ["block, warps, vector", *(f"{c.block} {c.num_warps} {c.vector}" for c in candidates)]
    print(aligned([headings], widths))
    chosen = dict(LAUNCH_SHAPES)
    for provider in own_providers():
        name = f"{provider.name} {provider.precision}"
        if not name.startswith("lion_dist flat") or wanted not in name:
            continue
        step = provider.build(make_params([(numel,)], provider.dtype, device))
        speeds = []
        for candidate in candidates:
            LAUNCH_SHAPES.update(dict.fromkeys(LAUNCH_SHAPES, candidate))
            speeds.append(numel * provider.bytes_per_param / time_on_gpu(step, repeats, budget_s=0.3).median / 1e6)
        print(aligned([[name, *(f"{speed:.0f}" for speed in speeds)]], widths), flush=True)
        del step
        free_gpu_memory()
    LAUNCH_SHAPES.update(chosen)


def plot(rows: list[dict], path: Path) -> None:
    """Bars of GB/s for each model, the copy ceiling as a line."""
    ceiling = rows[0]
    models = [m for m in MODELS if m != "4 MiB shard" and any(r["model"] == m for r in rows)]
    groups = [[r for r in rows if r["model"] == model][::-1] for model in models]
    heights = [len(group) for group in groups]
    size = (9, 1.5 + 0.24 * sum(heights))
    with figure_into(path, len(groups), size=size, height_ratios=heights) as (figure, axes):
        for axis, model, group in zip(axes[:, 0], models, groups, strict=True):
            labels = [f"{r['provider']}: {r['precision']}" for r in group]
            colors = ["tab:blue" if r["provider"].startswith("lion_dist") else "tab:gray" for r in group]
            bars = axis.barh(labels, [r["gb_per_s"] for r in group], color=colors)
            axis.bar_label(bars, [f"{r['ms_median']:.2f} ms" for r in group], padding=3, fontsize=8)
            axis.axvline(ceiling["gb_per_s"], color="tab:red", linestyle="--", label="copy")
            axis.set_xlim(0, 1.15 * ceiling["gb_per_s"])
            axis.set_title(f"{model} parameters" if "B" in model else f"{model} tensors")
            axis.tick_params(axis="y", labelsize=8)
            axis.legend(loc="lower right")
        axes[-1, 0].set_xlabel("GB/s of the bytes that must move")
        figure.suptitle(f"Lion step, {ceiling['device']}, torch {ceiling['torch']}, {ceiling['date']}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--providers", default="", help="only those whose name and precision contain this text")
    parser.add_argument("--repeats", type=int, default=None, help="default: 50, on the CPU 7")
    parser.add_argument("--numel", type=lambda text: int(float(text)), default=100_000_000, help="with --device cpu")
    parser.add_argument("--sweep", action="store_true", help="time launch shapes instead")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--png", type=Path, help="draw the rows here (GPU only)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible: pass --device cpu to measure the CPU path")
    if args.repeats is None:
        args.repeats = 50 if args.device == "cuda" else 7
    return args


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    if args.sweep:
        sweep(device, args.repeats, args.providers)
        return
    rows = Rows(args.csv, device)
    print(HEADER)
    for result in (run_on_gpu if device.type == "cuda" else run_on_cpu)(args, device):
        show(rows.add(result))
    report_rules(rows.rows)
    if args.png:
        plot(rows.rows, args.png)


if __name__ == "__main__":
    main()
