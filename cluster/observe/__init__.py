"""How is a run watched? On a terminal, and by Prometheus: what every worker tells it, and how it is found."""
