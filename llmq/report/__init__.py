"""Reports of a run: report.json, the terminal, the HTML page, the model card."""
