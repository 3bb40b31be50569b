"""How do gradients become steps? Optimisers by name over layer groups, and their constants; not their schedules."""
