"""What one Lion step is: on tensors, without ranks."""
