"""What MeZO is compared with: one file a method, each with `fit(problem, report)` → `Fitted` (see `zorl.baselines.problem`)."""
