"""From requests to model calls: caches, the runner, sampling, and the answer as it grows."""
