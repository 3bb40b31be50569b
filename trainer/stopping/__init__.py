"""When does a phase end? After epochs without a new best, or when its time is up; not what it trains until then."""
