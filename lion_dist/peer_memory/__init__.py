"""GPUs of one host copy gradients and parameters between each other's memory: the transport beside collectives."""
