"""How do the bytes of a row reach memory? Loose files, cached ones, shards; not in which order."""
