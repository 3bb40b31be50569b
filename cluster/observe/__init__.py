"""How is a run watched? What every worker tells Prometheus, and how it is found."""
