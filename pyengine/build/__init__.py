"""From a bundle to plans: compile, time, choose."""
