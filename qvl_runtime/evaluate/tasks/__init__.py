"""The tasks of the published tables, one file a kind."""
