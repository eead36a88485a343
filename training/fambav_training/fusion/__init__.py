"""Which fusion to use: settings, budgets, targets, sweeps and what each costs in time."""
