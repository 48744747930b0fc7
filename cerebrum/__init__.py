"""The rooms of both daemons, in folders that name their machine."""
