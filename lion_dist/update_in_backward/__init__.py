"""``ShardingConfig(update_in_backward=True)``: a step that happens inside backward."""
