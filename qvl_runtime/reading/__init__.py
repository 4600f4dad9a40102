"""Read what comes from outside, whatever it is: text of any encoding, JSON of any depth, files that may be none."""
