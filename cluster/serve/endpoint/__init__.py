"""How does a finished run answer over HTTP? As one ASGI app; what it says of images is predictor's matter."""
