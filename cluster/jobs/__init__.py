"""How does somebody use a cluster from afar? Ray Jobs' client, its token, and the rows in its logs."""
