"""What does this machine have? Cores, GPUs, memory, versions; not whether a job may begin on it."""
