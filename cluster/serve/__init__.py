"""What is a finished run used for? To say what is in new images, and to be handed on; how it is trained: see run."""
