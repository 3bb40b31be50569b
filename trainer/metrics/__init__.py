"""How good is the model? Metrics by name, exact over ranks, and the predictions behind them; nothing is drawn here."""
