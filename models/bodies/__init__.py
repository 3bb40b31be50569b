"""How does a network of torchvision's, timm's or ours become a body? One record for each; no head stands on it here."""
