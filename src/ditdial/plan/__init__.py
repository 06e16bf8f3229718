"""What a run is to do, as plain data: modes, schedules, budgets, and who chooses."""
