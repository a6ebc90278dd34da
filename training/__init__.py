"""How the small models that ship were trained: their world, and the training itself. Part of the repository, not of the wheel."""
