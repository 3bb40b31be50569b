"""What is each image? Labels from paths and columns, their meaning and counts, and targets made of them; no table."""
