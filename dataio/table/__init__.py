"""Which images are there, what is each, and in which split does it stand? Rows and their checks; no pixels."""
