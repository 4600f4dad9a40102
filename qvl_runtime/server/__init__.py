"""The HTTP server of `qvl serve`: OpenAI's API with images and boxes, over an `AsyncEngine`."""
