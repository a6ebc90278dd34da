"""Compiles a bundle: cuts or inlines at each op, times both, keeps the faster."""
