"""What Inductor makes of the GPU formulations, read where no GPU is."""
