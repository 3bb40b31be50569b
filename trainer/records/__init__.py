"""What is written down of a run? The kinds of rows, and who receives them; not what they mean."""
