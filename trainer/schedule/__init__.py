"""Which phases make up a run, and what are the rates at each step? Pure numbers; nothing is trained here."""
