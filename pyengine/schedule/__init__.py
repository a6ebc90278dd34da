"""Which level every frame has at every call, and what follows from it: pure functions of numbers."""
