"""The executor's parts on the CPU: numpy memory, our kernels on it, latents and decoding."""
