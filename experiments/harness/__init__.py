"""What every experiment shares: command line, run folder, report, plots, claims."""
