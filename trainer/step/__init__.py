"""How is one step taken, by all ranks together? Precision, reduction, recovery; not how many steps, nor how fast."""
