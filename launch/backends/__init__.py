"""Places where a job runs."""
