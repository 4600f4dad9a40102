"""GPTQ quantization of a float checkpoint, one decoder block at a time."""
