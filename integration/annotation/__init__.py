"""Find the modules of a checkpoint that adapters can target, and record them in its folder."""
