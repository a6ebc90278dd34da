"""Arrays on an NVIDIA GPU and the CUDA runtime, below every other part that uses them."""
