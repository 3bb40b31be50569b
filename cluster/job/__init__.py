"""What shall a run do? Jobs, their tables, ranges and recipes; nothing is run here."""
