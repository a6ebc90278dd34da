"""Runs a plan: programs, executors, memory, and the twins for host and GPU."""
