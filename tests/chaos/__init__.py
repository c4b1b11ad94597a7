"""Random faults over a running installation, and the checker that says whether anything was lost, doubled, early or out of order."""
