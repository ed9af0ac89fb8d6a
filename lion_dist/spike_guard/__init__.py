"""``skip_spikes``: a step whose gradient norm (or loss) is far above those of the steps before is not taken."""
