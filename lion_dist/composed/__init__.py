"""Jobs in which ranks hold different parts of one model: tensor, pipeline and expert parallel beside ZeRO."""
