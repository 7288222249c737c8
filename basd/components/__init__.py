"""The parts of the method: one file a part, its configuration beside it, one plain dict a group."""
