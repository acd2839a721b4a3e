"""What is loaded: names, files, configurations and their fingerprints."""
