"""Many policies in one run: the grid, the stored responses, and their replay through the harness."""
