"""Where do bytes lie, and how do they get there whole? Folders, object stores, the node's cache; not what they mean."""
