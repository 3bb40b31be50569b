"""How is a model handed to others? As a file or folder that is compared with it first; what it says itself: serve."""
