"""The admin API: status, metrics, explanations, a few switches, and the dashboard's page."""
