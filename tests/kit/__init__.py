"""What do tests share? One helper module a question; no test stands here."""
