"""How much memory a model needs and how fast it can be, computed before it is loaded."""
