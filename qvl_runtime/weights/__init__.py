"""Files to tensors and back: checkpoints as they are published, GPTQ's packing, and where to find them."""
