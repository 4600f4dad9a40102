"""What a model costs on this machine: speed by the published method, memory, and how both grow."""
