"""Where do trained weights come from, and do they fit? Files, downloads, runs; not which network they are for."""
