"""Does a checkpoint do here what its authors documented? Its files, its logits, their dialogues, speed and memory."""
