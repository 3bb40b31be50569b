"""Which images are there, and in which split is each? Sources, manifests, the record of each task; no pixels."""
