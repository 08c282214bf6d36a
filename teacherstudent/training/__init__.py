"""Networks, losses, schedules and batches; the `teacher`, `student` and `label` steps."""
