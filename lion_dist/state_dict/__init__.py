"""What ``ShardedLion`` saves and loads: the live state, what fits into it, and the whole state on one rank."""
