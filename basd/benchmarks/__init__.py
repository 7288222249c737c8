"""`basd bench`: what a part costs on this machine, as ratios of times that alternate in one run."""
