"""ART-V (arXiv:2311.18834): one frame per diffusion run, conditioned on earlier frames, the first frame and the prompt."""
