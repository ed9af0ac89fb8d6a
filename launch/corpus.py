"""Text as bytes: where it is read from, what is held out, and which windows a step trains on.

A token is a byte, so the vocabulary is 256 and no tokenizer is needed. Files are joined by a zero byte.
"""

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

HELD_OUT_EVERY = 20  # one file of 20 is never trained on
BINARY_PROBE_BYTES = 8192

# Not the standard library itself, or tables of numbers rather than text.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class CorpusError(ValueError):
    """The text cannot be used; the message gives the fact, the value and the remedy."""


@dataclass(frozen=True)
class Corpus:
    """train, held_out: uint8 [bytes]. No file lies in both; a single file is cut in two."""

    train: torch.Tensor
    held_out: torch.Tensor
    files: int

    @property
    def fingerprint(self) -> str:
        """Tells whether a resumed run reads the text that the first one did."""
        digest = hashlib.sha256(self.train.numpy())
        digest.update(self.held_out.numpy())
        return digest.hexdigest()[:16]


def read_corpus(data: str | None, seq_len: int) -> Corpus:
    """Reads `data` (a file, or a folder of text files), or the standard library's source when it is None.

    Raises CorpusError when nothing readable is there or it is shorter than one window of seq_len + 1 bytes.
    """
    paths = _standard_library_files() if data is None else _files_under(Path(data))
    texts = [text for text in map(_read_text, paths) if text]
    source = data or "the Python standard library"
    if not texts:
        raise CorpusError(
            f"no text in {source}: {len(paths)} files, all empty or binary. Pass --data PATH with text."
        )
    train, held_out = _split(texts)
    corpus = Corpus(_as_bytes_tensor(train), _as_bytes_tensor(held_out), files=len(texts))
    shortest = min(corpus.train.numel(), corpus.held_out.numel())
    if shortest < seq_len + 1:
        raise CorpusError(
            f"the text in {source} is too short: {corpus.train.numel()} bytes to train on and "
            f"{corpus.held_out.numel()} held out, but one window is {seq_len + 1} bytes. "
            "Pass more text to --data or a smaller --seq-len."
        )
    return corpus


def global_batch(text: torch.Tensor, batch_size: int, seq_len: int, seed: int, step: int) -> torch.Tensor:
    """The windows of one step, uint8 [batch_size, seq_len + 1]: a pure function of its arguments.

    Every rank draws the whole batch and takes its part, so the number of ranks does not change the data, and
    a resumed run needs no saved state of a data loader.
    """
    # torch's CPU generator keeps only the low 32 bits of a seed: (seed << 32) + step would forget the seed.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)
    starts = torch.randint(text.numel() - seq_len, (batch_size,), generator=generator)
    return text[starts[:, None] + torch.arange(seq_len + 1)]


def rank_part(batch: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """This rank's rows of a global batch whose rows divide evenly among the ranks."""
    return batch.chunk(world_size)[rank]


def held_out_windows(text: torch.Tensor, count: int, seq_len: int) -> torch.Tensor:
    """At most `count` windows spread evenly over the held-out text, uint8 [windows, seq_len + 1]."""
    last_start = text.numel() - seq_len - 1
    starts = torch.linspace(0, last_start, min(count, last_start + 1), dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(seq_len + 1)]


def held_out_parts(windows: torch.Tensor, rank: int, world_size: int, rows: int) -> list[tuple[torch.Tensor, int]]:
    """What a rank evaluates: (at most `rows` windows, their weight in the mean), as many times on every rank.

    A rank whose windows are used up goes on with one of weight 0: FSDP's forward waits for that of all ranks.
    """
    parts = [(part, len(part)) for part in windows[rank::world_size].split(rows) if len(part)]
    most = math.ceil(math.ceil(len(windows) / world_size) / rows)
    return parts + [(windows[:1], 0)] * (most - len(parts))


def _standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = root.rglob("*.py")
    return sorted(p for p in sources if not STDLIB_EXCLUDED.intersection(p.relative_to(root).parts))


def _files_under(path: Path) -> list[Path]:
    """The file itself, or every file under a folder that no leading dot hides, sorted by path."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CorpusError(f"no such file or folder: {path}. Pass --data PATH with a text file or a folder.")
    files = (p for p in path.rglob("*") if p.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts))


def _read_text(path: Path) -> bytes:
    """The file's bytes; b"" for a binary file, so that images beside the text are not trained on."""
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror}"
        raise CorpusError(f"{reason}. Make it readable or pass another --data.") from error
    return b"" if b"\0" in content[:BINARY_PROBE_BYTES] else content


def _split(texts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // HELD_OUT_EVERY
        return [texts[0][:cut]], [texts[0][cut:]]
    if len(texts) < HELD_OUT_EVERY:
        return texts[:-1], texts[-1:]
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def _as_bytes_tensor(texts: list[bytes]) -> torch.Tensor:
    joined = bytearray(b"\0".join(texts))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
