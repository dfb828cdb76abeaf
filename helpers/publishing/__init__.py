"""Running all notebooks, and what is made of them: report, site, claims, reference records, the command line."""
