"""Which images are there, what is each, and on which side does it stand? Rows and their checks; no pixels."""
