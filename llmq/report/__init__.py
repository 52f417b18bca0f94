"""What a run did, for people: report.json, the terminal, the page, the model card."""
