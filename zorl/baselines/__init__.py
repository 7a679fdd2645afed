"""What MeZO is compared with: one file per method, each with `fit(problem, report)` → `Fitted` (see `zorl.baselines.problem`)."""
