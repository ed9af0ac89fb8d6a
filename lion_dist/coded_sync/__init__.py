"""Updated parameters as codes of a step: exact, and a fraction of the bytes of the parameters themselves."""
