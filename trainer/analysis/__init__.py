"""What do a run's numbers say? Figures, known troubles, thresholds; reads rows, never the model."""
