"""The same parts on an NVIDIA GPU. Nothing here is imported before a plan for device `cuda` is asked for."""
