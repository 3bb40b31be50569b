"""What does training make small? Losses by name, their formulas, the weights of classes; metrics are elsewhere."""
