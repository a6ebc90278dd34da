"""Everything that touches an NVIDIA card. Nothing here is imported before a plan for device `cuda` is asked for."""
