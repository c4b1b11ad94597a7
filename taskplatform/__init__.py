"""Per-user jobs from static definitions, on Celery: once, on time, in strict priority, with nothing lost."""
