"""``ShardCodec``: the update codes of one shard, as one message of bytes, and their replay on the shards of others.

A message, for R rows (the slices of the shard that has most), numel elements and E escapes on the shard that has most::

    rates    [R, 2] fp32        lr and decay of each slice; 0 and 1 where nothing moves (skipped step, no gradient)
    steps    [R] int64          what the random bits of each slice are drawn from; only where there are any
    packed   [num_bytes] uint8  the digits (``codes.py``)
    index    [E] int32          places of the escapes in the shard; numel where there is none
    bits     [E] int16 | int32  their new parameters

It holds all that a replica needs beside its own parameters: no rank has to keep another's learning rate or step count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lion_dist.coded_sync import codes, codes_native
from lion_dist.coded_sync.codes import GROUP, INTEGER, TERNARY, DigitLayout
from lion_dist.kernels.reference import StepScalars, random_bits

CHUNK = 1 << 16  # elements; what the reference implementation works on at once stays in the cache
LARGEST_SHARD = 2**31 - 2**20
ESCAPE_STEP = 16  # escapes are sent in multiples of so many
ESCAPES_AT_MOST = 16  # one element of so many; beyond that a gather is hardly dearer


@dataclass(frozen=True)
class CodedSlice:
    """Elements ``[start, stop)`` of a shard, all of one parameter; ``start`` is a multiple of GROUP."""

    row: int  # in the message
    start: int
    stop: int
    index_start: int


@dataclass(frozen=True)
class Piece:
    """A part of a slice whose digits lie in one stream of the packed bytes (``codes.DigitLayout``)."""

    row: int
    start: int
    stop: int
    index_start: int
    power: int  # what its digits are multiplied by in their bytes
    byte: int  # where its first digit lies


class ShardCodec:
    """Encodes this rank's shard of a bucket and replays all others.

    Args:
        dtype: of the parameters.
        has_main: the update reads main params that other ranks do not have.
        shard_numel: elements of a shard, a multiple of GROUP.
        slices: of every shard, in the order of the ranks.
        shard: which of them is this rank's.
        seed: of the random bits.
        backend: as ``kernels.backends.choose_backend`` says.
        cautious_wd: an element decays only where its step has its sign.

    One step: ``begin``; the update (or ``update_and_encode`` in its place); ``encode``; ``message`` when all ranks have
    agreed on the number of escapes; ``replay`` when the messages are there. ``abandon`` when the parameters travel by
    themselves.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        has_main: bool,
        shard_numel: int,
        slices: Sequence[Sequence[CodedSlice]],
        shard: int,
        device: torch.device,
        seed: int,
        backend: str,
        cautious_wd: bool = False,
    ):
        if shard_numel % GROUP or any(s.start % GROUP for rows in slices for s in rows):
            raise ValueError(f"shards and slices begin on multiples of {GROUP} elements, got shards of {shard_numel}")
        if shard_numel >= LARGEST_SHARD:
            raise ValueError(
                f"a shard of {shard_numel} elements is too large for update codes, whose places are 32-bit numbers "
                f"(below {LARGEST_SHARD}). Use param_sync='gather', more ranks, or smaller parameters."
            )
        self.dtype, self.shard_numel, self.slices, self.shard = dtype, shard_numel, slices, shard
        self.layout: DigitLayout = codes.digits_for(dtype, has_main)
        self.draws_bits = self.layout is TERNARY and dtype == torch.bfloat16
        self.seed, self.device, self.backend, self.escape_step = seed, device, backend, ESCAPE_STEP
        self.cautious_wd = cautious_wd
        self.rows = max(1, *map(len, slices))
        self.capacity = max(ESCAPE_STEP, shard_numel // ESCAPES_AT_MOST // ESCAPE_STEP * ESCAPE_STEP)
        self._rates_nbytes, self._steps_nbytes = 8 * self.rows, 8 * self.rows * self.draws_bits
        self._packed_start = -(-(self._rates_nbytes + self._steps_nbytes) // GROUP) * GROUP
        self._packed_stop = self._packed_start + self.layout.num_bytes(shard_numel)
        self.tables = None  # the Triton backend's
        self.old: Tensor | None = None  # [shard_numel], between begin and encode
        self.count: Tensor | None = None  # [] int32, escapes of this step's update
        self.fixed: Tensor | None = None  # [_packed_stop] uint8, the message but for its escapes
        self.escape_index: Tensor | None = None  # [capacity] int32
        self.escape_bits: Tensor | None = None  # [capacity] int16 | int32

    def message_nbytes(self, escapes: int) -> int:
        return self._packed_stop + escapes * (4 + INTEGER[self.dtype].itemsize)

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """Cut every shard into pieces within CHUNK, which stay in the cache."""
        num_bytes = self.layout.num_bytes(self.shard_numel)
        cuts = sorted({*range(0, self.shard_numel, CHUNK), *range(0, self.shard_numel, num_bytes)})
        result: list[list[Piece]] = []
        for rows in self.slices:
            pieces = []
            for s in rows:
                bounds = [s.start, *(cut for cut in cuts if s.start < cut < s.stop), s.stop]
                for start, stop in zip(bounds, bounds[1:], strict=False):
                    stream, byte = divmod(start, num_bytes)
                    index = s.index_start + start - s.start
                    pieces.append(Piece(s.row, start, stop, index, self.layout.radix**stream, byte))
            result.append(pieces)
        return result

    # ---- the owner's side

    def begin(self, lr: Tensor, decay: Tensor, steps: Tensor | None, params: Tensor | None) -> None:
        """Note what this step's update does with the shard, and the shard as it is.

        Args:
            lr, decay: [slices] fp32 on the device; 0 and 1 for a slice that the update leaves as it is.
            steps: [slices] int64 on the device, completed steps; read where the parameters are rounded stochastically.
            params: [shard_numel], before the update; None when ``update_and_encode`` is to follow.
        """
        self.old = None if params is None else params.clone()
        self.fixed = torch.zeros(self._packed_stop, dtype=torch.uint8, device=self.device)
        rates = self.rates_of(self.fixed)[: len(lr)]
        rates[:, 0], rates[:, 1] = lr, decay
        if self.draws_bits:
            self.steps_of(self.fixed)[: len(steps)] = steps
        self.escape_index = torch.full((self.capacity,), self.shard_numel, dtype=torch.int32, device=self.device)
        self.escape_bits = torch.zeros(self.capacity, dtype=INTEGER[self.dtype], device=self.device)
        self.count = torch.zeros((), dtype=torch.int32, device=self.device)

    def encode(self, params: Tensor) -> Tensor:
        """Compare [shard_numel] updated parameters with those noted, unless the update has done so.

        Returns:
            [] int32 on the device: the escapes there are; more than ``capacity``: the message would not be whole.
        """
        if self.old is not None:
            self._backend.encode(self, params, self.count)
            self.old = None
        return self.count  # pyrefly: ignore[bad-return] # begin() has made it

    def update_and_encode(
        self,
        params: Tensor,  # [shard_numel], as everything up to the gradient
        main: Tensor | None,
        exp_avg: Tensor,
        grad: Tensor,
        scalars: StepScalars,
        *,
        grad_scale: Tensor,  # [] fp32
        moves: Tensor,  # [slices] bool on the device, False: the slice keeps its values
        steps: Tensor | None,  # [slices] int64 on the device, completed steps; where anything is rounded stochastically
        stochastic_momentum: bool,
    ) -> None:
        """The update of the shard, ``kernels.update.lion_update_``'s bits, and its codes in one launch (Triton)."""
        from lion_dist.coded_sync import update_triton as coded_update_triton

        coded_update_triton.update_and_encode(
            self,
            params,
            main,
            exp_avg,
            grad,
            scalars,
            grad_scale=grad_scale,
            moves=moves.view(torch.uint8),
            steps=steps,
            stochastic_momentum=stochastic_momentum,
        )

    def message(self, escapes: int) -> Tensor:
        """[message_nbytes(escapes)] uint8 for the other ranks. ``escapes``: at least as many as any rank has."""
        escape_bytes = [column[:escapes].view(torch.uint8) for column in (self.escape_index, self.escape_bits)]
        message = torch.cat([self.fixed, *escape_bytes])
        self.abandon()
        return message

    def abandon(self) -> None:
        """Forget this step's codes."""
        self.old = self.fixed = self.count = self.escape_index = self.escape_bits = None

    # ---- the replica's side

    def replay(self, flat_params: Tensor, messages: Tensor) -> None:
        """Bring every other rank's shard up to date, in place.

        Args:
            flat_params: [shards * shard_numel]; this rank's shard is not touched.
            messages: [shards, message_nbytes] uint8.
        """
        params = flat_params.view(len(self.slices), -1)
        self._backend.replay(self, params, messages)
        if self.backend != "triton":  # whose kernel writes them too
            for shard, message in enumerate(messages):
                if shard != self.shard:
                    self._restore_escapes(params[shard], message)

    def _restore_escapes(self, params: Tensor, message: Tensor) -> None:
        index, bits = self.escapes_of(message)
        there = index < self.shard_numel
        params.view(INTEGER[self.dtype])[index[there]] = bits[there]

    # ---- parts of a message

    def rates_of(self, message: Tensor) -> Tensor:
        return message[: self._rates_nbytes].view(torch.float32).view(-1, 2)

    def steps_of(self, message: Tensor) -> Tensor:
        return message[self._rates_nbytes : self._rates_nbytes + self._steps_nbytes].view(torch.int64)

    def packed_of(self, message: Tensor) -> Tensor:
        return message[self._packed_start : self._packed_stop]

    def escapes_of(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """([E] places, [E] bits)."""
        rest = message[self._packed_stop :]
        cut = 4 * (len(rest) // (4 + INTEGER[self.dtype].itemsize))
        return rest[:cut].view(torch.int32), rest[cut:].view(INTEGER[self.dtype])

    @cached_property
    def _backend(self):
        if self.backend == "triton":
            from lion_dist.coded_sync import codes_triton

            return codes_triton
        compiled = self.backend == "cpu_native" and codes_native.library() is not None
        return codes_native if compiled else _ByDefinition


class _ByDefinition:
    """``codes.py`` piece by piece, on any device. On a GPU, finding the escapes waits for it."""

    @staticmethod
    def encode(codec: ShardCodec, params: Tensor, count: Tensor) -> None:
        rates, packed = codec.rates_of(codec.fixed), codec.packed_of(codec.fixed)
        places = []
        for piece in codec.pieces[codec.shard]:
            part = slice(piece.start, piece.stop)
            bits = _bits_for(codec, codec.fixed, piece)
            how = (*rates[piece.row], codec.layout, bits, codec.cautious_wd)
            digits, escapes = codes.encode(codec.old[part], params[part], *how)
            packed[piece.byte : piece.byte + len(digits)] += digits * piece.power
            places.append(escapes.nonzero().flatten() + piece.start)
        index = torch.cat(places or [count.new_zeros(0)])
        count.fill_(len(index))
        index = index[: codec.capacity]
        codec.escape_index[: len(index)] = index
        codec.escape_bits[: len(index)] = params.view(INTEGER[codec.dtype])[index]

    @staticmethod
    def replay(codec: ShardCodec, params: Tensor, messages: Tensor) -> None:
        for shard, (mine, message) in enumerate(zip(params, messages, strict=True)):
            if shard == codec.shard:
                continue
            rates, packed = codec.rates_of(message), codec.packed_of(message)
            for piece in codec.pieces[shard]:
                part = mine[piece.start : piece.stop]
                digits = packed[piece.byte : piece.byte + len(part)].div(piece.power, rounding_mode="floor")
                bits = _bits_for(codec, message, piece)
                how = (*rates[piece.row], codec.layout, bits, codec.cautious_wd)
                part.copy_(codes.replay(part, digits % codec.layout.radix, *how))


def _bits_for(codec: ShardCodec, message: Tensor, piece: Piece) -> Tensor | None:
    if not codec.draws_bits:
        return None
    index = torch.arange(piece.stop - piece.start, device=codec.device) + piece.index_start
    return random_bits(index, codec.seed, codec.steps_of(message)[piece.row])
