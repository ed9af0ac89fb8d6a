"""Faults that the tests must notice: each changes one place of the package, and names the tests that ought to fail.

A text occurs once in its file (``test_faults.py``), so that the list follows the code. Choose tests that are quick and
need no GPU: ``make mutants`` runs them for each fault.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """In ``file``, ``old`` becomes ``new``. ``tests``: pytest's arguments, of which one must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BACKENDS = "tests/kernels/test_backends_equal_the_reference.py"
AVERAGED = f"{BACKENDS}::test_every_storage_with_an_average_of_the_weights"
PARITY = "tests/test_sharded_parity.py::test_ranks_arrive_at_the_bits_of_a_single_process"
ONE_LATE = (
    "tests/test_sharded_peers.py::test_nothing_is_read_too_early_or_written_too_soon_when_a_rank_is_late[0]",
    "tests/test_sharded_peers.py::test_nothing_is_read_too_early_or_written_too_soon_when_a_rank_is_late[1]",
)
SKIPS = "tests/test_sharded_bad_input.py::test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank"
DURABLE = "tests/checkpoint/test_disk_order.py::test_every_file_and_name_is_durable_before_the_checkpoint_gets_its_name"
KEPT = "tests/sharding/test_comm_stream.py::test_gradients_are_kept_for_the_communication_that_reads_them"

ARITHMETIC = [
    Fault(
        "reference: the betas change places in the update",
        "lion_dist/kernels/reference.py",
        "    c = m * scalars.beta1 + g * (1.0 - scalars.beta1)\n    sign",
        "    c = m * scalars.beta2 + g * (1.0 - scalars.beta2)\n    sign",
        (f"{BACKENDS}::test_every_storage[cpu_native-torch.float32-float32-None-float32]",),
    ),
    Fault(
        "reference: every tie is rounded up, not to even",
        "lion_dist/kernels/reference.py",
        "bits + 0x7FFF + ((bits >> 16) & 1)",
        "bits + 0x8000",
        ("tests/kernels/test_rounding.py::test_nearest_even_is_torchs_own_cast",),
    ),
    Fault(
        "C: the sign of zero is minus one",
        "lion_dist/cpu_backend/native.c",
        "(c > 0.f ? 1.f : 0.f) - (c < 0.f ? 1.f : 0.f)",
        "c > 0.f ? 1.f : -1.f",
        (f"{BACKENDS}::test_the_sign_of_zero_is_zero[cpu_native]",),
    ),
    Fault(
        "C: the remainder of split main params is rounded off",
        "lion_dist/cpu_backend/native.c",
        "EACH out[i] = (int16_t)(uint16_t)quiet_bits(x[i]);",
        "EACH out[i] = (int16_t)(uint16_t)(quiet_bits(x[i]) & 0xFFFEu);",
        (f"{BACKENDS}::test_every_storage[cpu_native-torch.float32-bfloat16-int16-float32]",),
    ),
    Fault(
        "PyTorch: no weight decay",
        "lion_dist/cpu_backend/eager.py",
        "p.mul_(factors.decay).add_(",
        "p.add_(",
        (f"{BACKENDS}::test_every_storage[cpu-torch.float32-float32-None-float32]",),
    ),
    Fault(
        "Triton: momentum and parameter share their random bits",
        "lion_dist/triton_backend/blocks.py",
        "_upper_half(_quiet_bits(new_m) + (random >> 16))",
        "_upper_half(_quiet_bits(new_m) + (random & 0xFFFF))",
        (f"{BACKENDS}::test_every_storage[triton-torch.float32-float32-None-bfloat16-stochastic]",),
    ),
    Fault(
        "Triton: a gradient that is not finite moves the momentum",
        "lion_dist/triton_backend/blocks.py",
        "tl.where(finite, new_m, m)",
        "new_m",
        (f"{BACKENDS}::test_a_gradient_that_is_not_finite_never_becomes_a_step[triton]",),
    ),
    Fault(
        "Triton: the average shares the parameter's random bits",
        "lion_dist/triton_backend/blocks.py",
        "_mix32(random ^ GOLDEN) & 0xFFFF",
        "random & 0xFFFF",
        (f"{AVERAGED}[triton-float32-None-float32-bfloat16 average]",),
    ),
    Fault(
        "C: without main params the average follows what was not yet rounded",
        "lion_dist/cpu_backend/native.c",
        "if (rounds_param) read_fp32(p, param, BF16, n); /* as it is stored */",
        "",
        (f"{AVERAGED}[cpu_native-bfloat16-None-float32-float32 average]",),
    ),
    Fault(
        "averages: the exchange counts as somebody else's write",
        "lion_dist/weight_swap.py",
        "with torch.autograd._unsafe_preserve_version_counter(tuple(params)), _no_backward_into(params):",
        "with _no_backward_into(params):",
        (
            "tests/test_averages.py::"
            "test_fp32_main_params_that_differ_from_their_parameter_are_not_taken_for_an_outside_write",
        ),
    ),
    Fault(
        "averages: gradients of averages are left for the next step",
        "lion_dist/weight_swap.py",
        "handles = [node.register_prehook(_refuse_backward) for node in nodes]",
        "handles = []",
        ("tests/test_averages.py::test_a_backward_inside_is_refused_before_it_leaves_a_gradient",),
    ),
    Fault(
        "averages: an engine's flat copy is taken for the model's parameter",
        "lion_dist/guards/hidden_tensors.py",
        "if id(param) not in given and not isinstance(param, Parameter):",
        "if id(param) not in given and False:",
        ("tests/test_hidden_tensors.py::test_a_flat_copy_that_comes_after_some_steps_is_refused",),
    ),
]

BUCKETS = [
    Fault(
        "layout: a slice begins where its parameter does",
        "lion_dist/sharding/layout.py",
        "yield ParamSlice(param, low - offset, high - offset, low)",
        "yield ParamSlice(param, 0, high - low, low)",
        ("tests/sharding/test_layout.py::test_every_element_of_every_parameter_has_one_owner",),
    ),
    Fault(
        "layout: 4 buckets instead of 13",
        "lion_dist/sharding/layout.py",
        "round_up(total_numel, 13) // 13",
        "round_up(total_numel, 4) // 4",
        ("tests/sharding/test_layout.py::test_a_model_of_a_billion_parameters_has_13_buckets",),
    ),
    Fault(
        "bucket: gradients go from any state to any other",
        "lion_dist/sharding/bucket.py",
        "if (self.grad_state, new) not in _GRAD_TRANSITIONS:",
        "if False:",
        ("tests/sharding/test_bucket.py::test_a_reduction_that_nobody_started_cannot_end",),
    ),
    Fault(
        "bucket: parameters go from any state to any other",
        "lion_dist/sharding/bucket.py",
        "if (self.param_state, new) not in _PARAM_TRANSITIONS:",
        "if False:",
        ("tests/sharding/test_bucket.py::test_parameter_states_in_order",),
    ),
    Fault(
        "bucket: a further micro-batch takes the place of the earlier ones",
        "lion_dist/sharding/bucket.py",
        "adds_up = self.grad_state is GradState.REDUCED",
        "adds_up = False",
        ("tests/sharding/test_bucket.py::test_micro_batches_add_up_in_fp32",),
    ),
    Fault(
        "collectives: the backend's own sums lack the first rank's gradients",
        "lion_dist/sharding/collectives.py",
        "_reduce_scatter_single(output, flat, group=group",
        "_reduce_scatter_single(output, flat * min(group.rank(), 1), group=group",
        ("tests/test_sharded_sums.py::test_the_backends_own_sums_are_as_close_as_rounding_allows",),
    ),
    Fault(
        "collectives: sums in rank order lack the last rank's gradients",
        "lion_dist/sharding/collectives.py",
        "for addend in received[1:]:",
        "for addend in received[1:-1]:",
        ("tests/test_sharded_sums.py::test_sums_in_rank_order_are_exact[None-2]",),
    ),
    Fault(
        "gradients are not kept until they have been packed",
        "lion_dist/sharding/collective_transport.py",
        "        self._stream.keep_alive_until_done(grads)\n",
        "",
        (f"{KEPT}[by_collectives-1]",),
    ),
    Fault(
        "a GPU's stream keeps nothing",
        "lion_dist/sharding/comm_stream.py",
        "self._held.append((event, tensors))",
        "self._held.append((event, ()))",
        (
            "tests/sharding/test_comm_stream.py::test_a_gpus_stream_that_nobody_waits_for_keeps_all_until_it_is_told",
            "tests/sharding/test_comm_stream.py::test_a_gpus_stream_keeps_what_the_last_buckets_read_and_the_program_waits_for_the_one_before",
        ),
    ),
    Fault(
        "param sync: only the first bucket of a launch is gathered",
        "lion_dist/param_sync.py",
        "            for bucket in buckets:\n                bucket.start_param_sync()",
        "            for bucket in buckets[:1]:\n                bucket.start_param_sync()",
        (f"{PARITY}[stage2-1x-2]",),
    ),
    Fault(
        "forward: a module does not wait for its parameters",
        "lion_dist/sharding/forward_hooks.py",
        "                if bucket.param_state is not ParamState.FULL:\n                    hooks.finish(bucket)",
        "                pass",
        ("tests/test_sharded_overlap.py::test_no_parameter_is_read_in_flight_by_a_training_forward[ReadsFromLists-1]",),
    ),
]

PEERS = [
    Fault(
        "peers: an all-gather without its second barrier",
        "lion_dist/peer_memory/memory.py",
        "(buffer.peers[owner].narrow(0, first, shard_numel))\n            self.barrier()\n",
        "(buffer.peers[owner].narrow(0, first, shard_numel))\n",
        ONE_LATE,
    ),
    Fault(
        "peers: an all-gather without its first barrier",
        "lion_dist/peer_memory/memory.py",
        "            self.barrier()\n            for owner in self.others():",
        "            for owner in self.others():",
        ONE_LATE,
    ),
    Fault(
        "peers: one receive buffer instead of two",
        "lion_dist/peer_memory/transport.py",
        "RECEIVE_BUFFERS = 2",
        "RECEIVE_BUFFERS = 1",
        ONE_LATE,
    ),
    Fault(
        "peers: gradients are summed before all have been sent",
        "lion_dist/peer_memory/transport.py",
        "                memory.barrier()  # every rank has sent\n",
        "",
        ONE_LATE,
    ),
    Fault(
        "peers: gradients are not kept until they have been sent",
        "lion_dist/peer_memory/transport.py",
        "self.squares, adds_up=adds_up)\n            self._stream.keep_alive_until_done(grads)",
        "self.squares, adds_up=adds_up)",
        (f"{KEPT}[by_peers-1]",),
    ),
    Fault(
        "peers: gradients are not kept until they have been sent to replicas",
        "lion_dist/peer_memory/transport.py",
        "self._copies.squares(), adds_up=False)\n        self._stream.keep_alive_until_done(grads)",
        "self._copies.squares(), adds_up=False)",
        (f"{KEPT}[by_peers-2]",),
    ),
    Fault(
        "transport: the one that connects is not chosen",
        "lion_dist/choose_transport.py",
        "        if transport is not None:",
        "        if transport is None:",
        ("tests/test_sharded_peers.py::test_no_collective_moves_gradients_or_parameters",),
    ),
]

STEP = [
    Fault(
        "gradient check: a NaN is finite",
        "lion_dist/sharding/gradient_check.py",
        "outcome = (total < math.inf) == self._taken_or_skipped",
        "outcome = (total != math.inf) == self._taken_or_skipped",
        (f"{SKIPS}[nan-last rank-1]",),
    ),
    Fault(
        "gradient check: the norm is one rank's",
        "lion_dist/sharding/grad_norm.py",
        "for axis in groups.axes:",
        "for axis in groups.axes[:0]:",
        ("tests/test_sharded_clip.py::test_clipping_equals_torchs_on_the_full_gradient[2-0.1]",),
    ),
    Fault(
        "gradient check: replicas are counted twice",
        "lion_dist/sharding/grad_norm.py",
        "message[:1] / groups.replicate_world_size",
        "message[:1]",
        ("tests/test_sharded_groups.py::test_model_on_a_mesh_of_replicas[None-1]",),
    ),
    Fault(
        "clip: small gradients are made larger",
        "lion_dist/sharding/gradient_check.py",
        "(max_norm / (norm + 1e-6)).clamp(max=1.0)",
        "(max_norm / (norm + 1e-6))",
        ("tests/test_sharded_clip.py::test_clipping_equals_torchs_on_the_full_gradient[1-1000000.0]",),
    ),
    Fault(
        "skip: the step is counted as skipped, and taken",
        "lion_dist/param_sync.py",
        "skip=terms.skip, check=False",
        "skip=None, check=False",
        (f"{SKIPS}[inf-last rank-1]",),
    ),
    Fault(
        "version tracker: what others write is not seen",
        "lion_dist/version_tracker.py",
        "return bool(moved) or known != self._versions[bucket]",
        "return bool(moved)",
        (
            "tests/test_sharded_main_params.py::"
            "test_main_params_follow_what_is_written_from_outside[False-load_state_dict-bf16-fp32]",
        ),
    ),
    Fault(
        "version tracker: our own updates are taken for others'",
        "lion_dist/version_tracker.py",
        "        torch.autograd.graph.increment_version(list(params))\n        self.add(buckets)",
        "        torch.autograd.graph.increment_version(list(params))",
        ("tests/test_sharded_main_params.py::test_ordinary_training_is_not_taken_for_a_change",),
    ),
    Fault(
        "grad scaler: an overflow is known to its own rank only",
        "lion_dist/grad_scaler.py",
        "        _agree_over_shards_(found, found_inf, params)\n",
        "",
        ("tests/integrations/test_fsdp1.py::test_overflow_on_one_rank_skips_the_step_on_all[lion_dist's-flat]",),
    ),
    Fault(
        "DDP: the reducer and its buckets stay",
        "lion_dist/ddp_takeover.py",
        '            del vars(ddp)["reducer"], vars(ddp)["logger"]\n',
        "",
        ("tests/test_sharded_ddp.py::test_the_reducer_and_its_memory_are_gone",),
    ),
    Fault(
        "DDP: gradients are reduced where the program says that they are not",
        "lion_dist/ddp_takeover.py",
        "scheduler.in_no_sync = not is_required",
        "pass",
        ("tests/test_sharded_ddp.py::test_require_backward_grad_sync_can_be_set",),
    ),
    Fault(
        "DDP: buffers are each rank's own",
        "lion_dist/ddp_takeover.py",
        "        if self._check_sync_bufs_pre_fwd():\n            self._sync_buffers()\n",
        "",
        ("tests/test_sharded_ddp.py::test_buffers_are_broadcast_as_ddp_does_and_bits_are_those_of_ddp_and_lion",),
    ),
]

BESIDE = [
    Fault(
        "coded sync: a parameter that one rank has written is sent as codes",
        "lion_dist/coded_sync/send_codes.py",
        "                    counts[i].fill_(TOO_MANY)\n",
        "                    pass\n",
        ("tests/coded_sync/test_param_sync.py::test_a_bucket_that_one_rank_cannot_code_is_gathered_on_all",),
    ),
    Fault(
        "replica check: a difference counts when all ranks have it",
        "lion_dist/replica_check.py",
        ".flatten(0, 1).any(0)",
        ".flatten(0, 1).all(0)",
        ("tests/test_replica_check.py::test_one_flipped_bit_is_named_by_rank_bucket_and_parameter_and_repaired[2-0]",),
    ),
    Fault(
        "state dict: main params start afresh from the parameters",
        "lion_dist/state_dict/full_state.py",
        "for kind, part in shard.elementwise.items():",
        'for kind, part in [("exp_avg", shard.exp_avg)]:',
        ("tests/test_sharded_full_state.py::test_the_whole_state_is_plain_lions_to_the_bit[2-sharded-0-split]",),
    ),
    Fault(
        "state dict: counters are not loaded",
        "lion_dist/state_dict/load_plan.py",
        "        self._live.counters.copy_(self._counters)\n",
        "",
        (
            "tests/test_sharded_full_state.py::"
            "test_a_whole_state_goes_on_bit_identically_on_any_ranks_and_under_plain_lion[split]",
        ),
    ),
    Fault(
        "checkpoint: a file is not made durable",
        "lion_dist/checkpoint/storage.py",
        "os.fsync(self.fileno())",
        "self.fileno()",
        (DURABLE,),
    ),
    Fault(
        "checkpoint: a name is not made durable",
        "lion_dist/checkpoint/directory.py",
        "    partial.rename(path)\n    sync(path.parent)\n",
        "    partial.rename(path)\n",
        (DURABLE,),
    ),
    Fault(
        "checkpoint: an enum that Python 3.11.2 has pickled is refused",
        "lion_dist/checkpoint/metadata.py",
        '        if (module, name) == ("builtins", "getattr"):\n            return _member_by_name\n',
        "",
        ("tests/checkpoint/test_refused_loads.py::test_what_python_3_11_2_saved_loads",),
    ),
    Fault(
        "checkpoint: the last rows of a range are shifted",
        "lion_dist/boxes.py",
        "tail = _within_row(shape, last, 0, stop % row)",
        "tail = _within_row(shape, last, row - stop % row, row)",
        ("tests/checkpoint/test_boxes.py::test_boxes_hold_each_element_of_the_range_once_and_in_order",),
    ),
    Fault(
        "checkpoint: checksums are not compared",
        "lion_dist/checkpoint/manifest.py",
        """    if f"{checksum:08x}" != entry["crc32"]:""",
        "    if False:",
        (
            "tests/checkpoint/test_durability.py::test_a_damaged_file_is_refused_by_name_on_every_rank[__0_0.distcp-flipped]",
        ),
    ),
    Fault(
        "profiler: labels have another name",
        "lion_dist/sharding/phases.py",
        'LABEL = "lion_dist."',
        'LABEL = "lion."',
        (
            "tests/test_sharded_watched.py::test_every_phase_carries_a_label_with_the_first_and_last_parameter_of_its_bucket",
        ),
    ),
    Fault(
        "profiler: a phase's label is renamed",
        "lion_dist/sharding/phases.py",
        'Literal["grad_sync", "norm",',
        'Literal["grad_sync", "check",',
        ("tests/test_sharded_watched.py::test_the_overlap_benchmark_finds_the_labels_that_the_profiler_has_written",),
    ),
]

FAULTS = [*ARITHMETIC, *BUCKETS, *PEERS, *STEP, *BESIDE]
