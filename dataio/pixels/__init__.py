"""What are one sample's pixels? Decoding, geometry, colours, and the engines that render them; not which sample."""
