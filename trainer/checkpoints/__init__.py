"""How does a run survive its end? What a checkpoint holds, who writes it, and when; not what is done after."""
