"""Every Python process that has this directory on its path believes in the GPUs that FAKE_GPUS lists."""

import os

from basd.grid import leases

leases.machine_devices = lambda: os.environ["FAKE_GPUS"].split(",")
