"""In which order do samples come, and how do they become batches? The pure stream and the loaders over it."""
