"""What does a run leave? Result, predictions, bundle and report, written at its end; nothing is trained here."""
