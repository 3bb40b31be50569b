"""Where do bytes lie, and how are they written whole? Folders, object stores, the node's cache; not what they mean."""
