"""What agents do with tasks at the desk: outcomes, refusals, and reports on two models."""
