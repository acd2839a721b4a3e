"""Tables, plots and one HTML page from the folders that sweeps write."""
