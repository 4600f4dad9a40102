"""What a model, an engine and a generation are configured by: frozen dataclasses that validate themselves."""
