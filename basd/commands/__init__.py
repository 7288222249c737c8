"""What each command does. Part of the command line: the only rooms that know both basd and analysis."""
