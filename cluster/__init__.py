"""Where data, model and trainer meet: jobs, launchers (Ray, torchrun, in process), metrics, the command line."""
