"""The truth about what is kept: index, policy, leases, plans. No clock, no I/O."""
