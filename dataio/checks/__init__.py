"""Can a data set be trusted? Unreadable files, changed tables, duplicates, missing classes; nothing is repaired."""
