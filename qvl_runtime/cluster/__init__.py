"""More than one engine: what goes to which, over machines, with Ray or behind a proxy."""
