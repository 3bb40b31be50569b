"""Where do the workers run? In this process, under torchrun, on Ray; not what they do there."""
