"""Tasks, graders, reports and gates."""
