"""The metrics of the published tables, each in plain Python without Java, on the text of one answer."""
