"""What can be typed? One file a group of verbs; what they do lies elsewhere."""
