"""Fine-tuning: a trainable network on published checkpoints, LoRA, Q-LoRA, the training loop, and merging."""
