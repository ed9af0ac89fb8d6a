"""Of tests that draw: the same on every run, until somebody asks for others."""

import os


def fuzz_seed() -> int:
    """LION_DIST_FUZZ_SEED, or a fixed number; printed, so that a failure can be had again."""
    seed = int(os.environ.get("LION_DIST_FUZZ_SEED", 20261127))
    print(f"LION_DIST_FUZZ_SEED={seed}")
    return seed
