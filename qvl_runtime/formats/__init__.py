"""What the tensors of a checkpoint file mean: their names and shapes, GPTQ packing, quantization grids."""
