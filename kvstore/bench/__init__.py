"""What `kvstore bench` runs: every figure beside its floor, measured in the same run."""
