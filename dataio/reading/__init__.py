"""How do the bytes of a row reach memory? From loose files, cached files and shards; not in which order."""
